"""Trains nano in three stages; each writes a checkpoint with the state it can resume from.

  python train.py vision   --minutes 40   tower and connector on single pictures, supervised slot by slot
  python train.py language --minutes 40   decoder on ideal visual tokens computed from the true scene
  python train.py joint    --minutes 40   everything together on clips, loss of the reply plus the slots' loss

A group of the resampler sees exactly one frame, so tower and connector can be trained on independent pictures.
The two visual tokens of a frame are its (up to) two objects, ordered by colour. What such a token should be is fixed
in advance by `ideal_tokens`: so the first two stages do not need each other and can run side by side.
"""
import argparse
import math
import multiprocessing as mp
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
import text as T
import tokenizer
from model import Model, load_config

NANO = Path(__file__).resolve().parent.parent
WORK = Path("work")
N_COLOUR, N_SHAPE = len(T.COLOURS) + 1, len(T.SHAPES) + 1  # class 0: nothing there


# ---- ideal visual tokens -------------------------------------------------------------------

def _basis(dim):
    g = torch.Generator().manual_seed(7)
    return torch.linalg.qr(torch.randn(dim, N_COLOUR + N_SHAPE + 3, generator=g))[0]


def ideal_tokens(slots, dim, noise=0.0):
    """Slot targets [..., 2, 6] -> what the connector should put out before its position table, [..., 2, dim]."""
    c, s = F.one_hot(slots[..., 0].long(), N_COLOUR), F.one_hot(slots[..., 1].long(), N_SHAPE)
    geo = slots[..., 2:5] * torch.tensor([1.2, 1.2, 0.9])
    if noise:
        geo = geo + noise * torch.randn_like(geo) * slots[..., 5:]
    a = torch.cat([1.5 * c, 1.5 * s, geo], -1)
    t = F.layer_norm(a @ _basis(dim).T, (dim,))
    return t + 2 * noise * torch.randn_like(t) if noise else t


# ---- plumbing ------------------------------------------------------------------------------

def worker(queue, kind, seed, args):
    """Makes batches for ever in its own process."""
    torch.set_num_threads(1)
    rng, nrng = random.Random(seed), np.random.default_rng(seed)
    tok = tokenizer.load()
    seen = WORK / "seen.pt"  # clips the finished connector has looked at
    known = torch.load(seen, weights_only=False)["scenes"] if kind == "slots" and args.real and seen.exists() else None
    while True:
        if kind == "frames":
            queue.put(data.frame_batch(rng, nrng, args.batch))
        else:
            pool = []
            for _ in range(4):
                second = rng.random() < 0.03  # some batches continue a conversation
                which = [rng.randrange(len(known)) if known and rng.random() < args.real else -1 for _ in range(args.clips)]
                scenes = [known[i] if i >= 0 else data.make_scene(rng, mix=args.mix) for i in which]
                frames, slots, pairs = data.clip_batch(rng, nrng, args.clips, 2 if second else args.questions, kind == "clips", scenes)
                if second:
                    queue.put((frames, slots, np.array(which), *pack(tok, [T.two_turns(*clip) for clip in pairs])))
                else:
                    pool += zip(frames if frames is not None else [None] * args.clips, slots, which, pairs)
            # clips with texts of like length go together: less padding
            pool.sort(key=lambda c: max(len(p) + len(r) for p, r in c[3]))
            parts = [pool[i:i + args.clips] for i in range(0, len(pool), args.clips)]
            rng.shuffle(parts)
            for part in parts:
                frames, slots, which, pairs = zip(*part)
                queue.put((np.stack(frames) if kind == "clips" else None, np.stack(slots), np.array(which),
                           *pack(tok, [p for clip in pairs for p in clip])))


def pack(tok, pairs):
    """Text pairs -> ids [B, n] padded right, labels [B, n] (-100 outside the reply)."""
    rows = [(tok.encode(p).ids, tok.encode(r).ids) for p, r in pairs]
    n = max(len(p) + len(r) for p, r in rows)
    ids, labels = np.zeros((len(rows), n), np.int64), np.full((len(rows), n), -100, np.int64)
    for i, (p, r) in enumerate(rows):
        ids[i, :len(p) + len(r)] = p + r
        labels[i, len(p):len(p) + len(r)] = r
    return ids, labels


def stream(kind, seed, args):
    q = mp.Queue(6)
    mp.Process(target=worker, args=(q, kind, seed, args), daemon=True).start()
    while True:
        yield [x if x is None else torch.from_numpy(x) for x in q.get()]


class Schedule:
    """Warm-up and cosine decay over a budget of minutes, so that it ends in time on a busy machine."""

    def __init__(self, opt, minutes, done=0.0):
        self.opt, self.total, self.start = opt, minutes * 60, time.time() - done
        self.base = [g["lr"] for g in opt.param_groups]

    def elapsed(self):
        return time.time() - self.start

    def step(self, i):
        p = min(self.elapsed() / self.total, 1)
        f = min(1, (i + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * p)))
        for g, lr in zip(self.opt.param_groups, self.base):
            g["lr"] = lr * f
        return p


def groups(modules, lr, decay):
    """Matrices decay, vectors and embeddings don't."""
    ps = [p for m in modules for p in m.parameters()]
    return [{"params": [p for p in ps if p.ndim >= 2], "lr": lr, "weight_decay": decay},
            {"params": [p for p in ps if p.ndim < 2], "lr": lr, "weight_decay": 0.0}]


class Optimiser:
    """Muon for the decoder's hidden matrices (a step's update is made orthogonal: about half the samples of AdamW for the
    same loss), AdamW for everything else. One thing to the schedule and to checkpoints."""

    def __init__(self, muon, adam_groups):
        self.parts = [torch.optim.AdamW(adam_groups, betas=(0.9, 0.98))]
        if muon:  # its rates are on AdamW's scale
            ps, lr, decay = muon
            self.parts.append(torch.optim.Muon(ps, lr=lr, weight_decay=decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"))

    @property
    def param_groups(self):
        return [g for p in self.parts for g in p.param_groups]

    def zero_grad(self):
        for p in self.parts:
            p.zero_grad(set_to_none=True)

    def step(self):
        for p in self.parts:
            p.step()

    def state_dict(self):
        return [p.state_dict() for p in self.parts]

    def load_state_dict(self, states):
        for p, s in zip(self.parts, states, strict=True):
            rates = [g["lr"] for g in p.param_groups]
            p.load_state_dict(s)
            for g, lr in zip(p.param_groups, rates):
                g["lr"] = lr


def decoder_optimiser(llm, lr, decay):
    hidden = [p for p in llm.layers.parameters() if p.ndim == 2]
    rest = [llm.embed_tokens.weight] + [p for p in llm.parameters() if p.ndim < 2]
    return Optimiser((hidden, lr, decay), [{"params": rest, "lr": lr, "weight_decay": 0.0}])


def init(model):
    for n, p in model.named_parameters():
        if n.endswith("bias"):
            nn.init.zeros_(p)
        elif p.ndim >= 2:
            nn.init.normal_(p, std=0.05 if "embed" in n or "probe" in n else min(0.06, p.flatten(1).shape[1] ** -0.5 * 0.8))
    with torch.no_grad():
        for n, p in model.named_parameters():  # quiet residual branches
            if any(k in n for k in ("out_proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight", "to_out", ".1.3.weight")):
                p.mul_(0.4)
        nn.init.normal_(model.resampler.latents, std=1.0)


def save(name, **state):
    WORK.mkdir(exist_ok=True)
    torch.save(state, WORK / f"{name}.tmp")
    (WORK / f"{name}.tmp").rename(WORK / f"{name}.pt")


class Heads(nn.Module):
    """Thrown away afterwards: reads a patch of the tower (with a layer norm in front, its scale is free)."""

    def __init__(self, d):
        super().__init__()
        self.norm, self.out = nn.LayerNorm(d), nn.Linear(d, N_COLOUR + N_SHAPE + 3)

    def forward(self, x):
        return self.out(self.norm(x)).split([N_COLOUR, N_SHAPE, 3], -1)


def read_slots(tokens, scale=1.0):
    """Connector outputs (without positions) -> colour logits, shape logits, (x, y, size) by the ideal tokens' basis."""
    a = tokens @ _basis(tokens.shape[-1])
    c, s, g = a.split([N_COLOUR, N_SHAPE, 3], -1)
    return c * scale, s * scale, g


def slot_loss(lat, slots):
    """lat [N, 2, dim] against slots [N, 2, 6] -> loss, colour accuracy, shape accuracy (both over present objects)."""
    goal = ideal_tokens(slots, lat.shape[-1])
    c, s, _ = read_slots(lat)
    there = slots[..., 5] > 0
    ct, st = slots[..., 0].long(), slots[..., 1].long()
    loss = F.mse_loss(lat, goal) + 0.15 * (F.cross_entropy(c.flatten(0, -2), ct.flatten()) + F.cross_entropy(s.flatten(0, -2), st.flatten()))
    with torch.no_grad():
        ca = (c.argmax(-1) == ct)[there].float().mean().item()
        sa = (s.argmax(-1) == st)[there].float().mean().item()
        ge = ((lat - goal) @ _basis(lat.shape[-1])[:, -3:])[there].abs().mean().item()
    return loss, ca, sa, ge


def dense_loss(heads, feats, dense):
    c, s, g = heads(feats)
    w = dense[..., 5]
    fg = (dense[..., 0] > 0) & (w > 0)
    per = F.cross_entropy(c.movedim(-1, 1), dense[..., 0].long(), reduction="none") * w
    loss = per.mean() * 2 + F.cross_entropy(s[fg], dense[..., 1][fg].long()) + 3 * F.smooth_l1_loss(g[fg], dense[..., 2:5][fg], beta=0.2)
    with torch.no_grad():
        sa = (s[fg].argmax(-1) == dense[..., 1][fg]).float().mean().item()
        ca = (c.argmax(-1) == dense[..., 0])[fg].float().mean().item()
        ge = (g[fg] - dense[..., 2:5][fg]).abs().mean().item()
    return loss, ca, sa, ge


# ---- stages --------------------------------------------------------------------------------

def vision(args, model):
    heads = Heads(model.c.vdim)
    opt = torch.optim.AdamW(groups([model.tower, model.resampler], args.lr, 0.01) + groups([heads], 1e-3, 0.0), betas=(0.9, 0.98))
    step, done = 0, 0.0
    if (WORK / "vision.pt").exists() and args.resume:
        st = torch.load(WORK / "vision.pt")
        model.load_state_dict(st["model"]), heads.load_state_dict(st["heads"]), opt.load_state_dict(st["opt"])
        step, done = st["step"], st["done"]
    sched = Schedule(opt, args.minutes, 0.0 if args.both else done)
    sched.base = [args.lr, args.lr, 1e-3, 1e-3]
    seen, t0, acc = 0, time.time(), np.zeros(8)
    for frames, slots, dense in stream("frames", args.seed + step, args):
        p = sched.step(step)
        # first the tower, then the connector on a frozen tower; `--both` afterwards: the two together
        with torch.set_grad_enabled(args.both or p <= args.alone):
            feats = model.features(frames[:, None])[:, 0]
            loss, *a = dense_loss(heads, feats, dense)
        b = [0.0] * 4
        if args.both or p > args.alone:
            sl, *b = slot_loss(model.resampler.chunk(feats[:, 1:]), slots)
            loss = 0.3 * loss + 2 * sl if args.both else sl
            b = [sl.item(), *b]
        opt.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        acc += [loss.item(), *a, *b]
        step, seen = step + 1, seen + len(frames)
        if step % args.log == 0:
            m = acc / args.log
            print(f"{sched.elapsed()/60:6.1f}m step {step} {seen/(time.time()-t0):.0f}/s loss {m[0]:.3f} | patches colour {m[1]:.3f} shape {m[2]:.3f} "
                  f"geo {m[3]:.3f} | slots {m[4]:.3f} colour {m[5]:.3f} shape {m[6]:.3f} geo {m[7]:.3f}", flush=True)
            acc[:], seen, t0 = 0, 0, time.time()
        if step % 200 == 0 or p >= 1:
            save("vision", model=model.state_dict(), heads=heads.state_dict(), opt=opt.state_dict(), step=step, done=sched.elapsed())
        if p >= 1:
            break


def reply_loss(model, past, vis, ids, labels):
    """Loss of the reply's tokens; `past` holds the system text, computed once. Also which rows are exactly right."""
    _, past = model.llm(vis, past)
    h, _ = model.llm(model.llm.embed_tokens(ids[:, :-1]), past)
    labels = labels[:, 1:]
    on = labels != -100
    logits = model.logits(h[on])
    loss = F.cross_entropy(logits, labels[on])
    wrong = torch.zeros(len(ids)).index_add_(0, on.nonzero()[:, 0], (logits.argmax(-1) != labels[on]).float())
    return loss, wrong == 0


def system_past(model, tok):
    return model.llm(model.llm.embed_tokens(torch.tensor([tok.encode(T.BEFORE_IMAGE).ids])))[1]


def chat_loss(model, tok, rng):
    pairs = [(T.SYSTEM + "USER: " + q + " ASSISTANT:", r) for q, r in (T.chat_pair(rng) for _ in range(4))]
    ids, labels = map(torch.from_numpy, pack(tok, pairs))
    h, _ = model.llm(model.llm.embed_tokens(ids[:, :-1]))
    return F.cross_entropy(model.logits(h).flatten(0, 1), labels[:, 1:].flatten())


def exercise_loss(model, tok, rng, n):
    """Judging the options is the slowest thing to learn, and needs no video: short exercises made of the last part of
    a reply (fact, options, conclusion), with the loss only on each yes or no and on the letter."""
    yes, no, so = (tok.encode(x).ids[0] for x in (" yes", " no", " so"))
    rows = []
    while len(rows) < n:
        scene = data.make_scene(rng)
        q = T.make_question(rng, scene)
        if q:
            s = T.reply(scene, q)
            rows.append(tok.encode(s[s.index(" The question"):s.index(" fits")]).ids)
    m = max(map(len, rows))
    ids = torch.tensor([r + [0] * (m - len(r)) for r in rows])
    goal, prev = ids[:, 1:], ids[:, :-1]
    h, _ = model.llm(model.llm.embed_tokens(prev))
    on = (goal == yes) | (goal == no) | (prev == so)
    logits = model.logits(h[on])
    return F.cross_entropy(logits, goal[on]), (logits.argmax(-1) == goal[on]).float().mean().item()


def language(args, model):
    tok = tokenizer.load()
    opt = decoder_optimiser(model.llm, args.lr, 0.05)
    step, done = 0, 0.0
    if (WORK / "language.pt").exists() and args.resume:
        st = torch.load(WORK / "language.pt")
        model.load_state_dict(st["model"]), opt.load_state_dict(st["opt"])
        step, done = st["step"], st["done"]
    sched = Schedule(opt, args.minutes, 0.0 if args.again else done)
    seen, t0, acc = 0, time.time(), np.zeros(3)
    seen_file = WORK / "seen.pt"
    real = torch.load(seen_file, weights_only=False)["tokens"].float() if args.real and seen_file.exists() else None
    for _, slots, which, ids, labels in stream("slots", args.seed + step, args):
        p = sched.step(step)
        for k in range(args.extra):  # cheap steps of exercises alone
            opt.zero_grad()
            ll, e = exercise_loss(model, tok, random.Random(args.seed * 100003 + step * 100 + k + 50), args.exercises)
            ll.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            acc[2] += e / args.extra
            if k % 10 == 9:
                print(f"  exercise {ll.item():.3f} {e:.3f} {sched.elapsed()/60:.1f}m", flush=True)
        vis = ideal_tokens(slots, model.c.dim, args.noise).flatten(1, 2)
        if real is not None:  # what the connector really puts out, errors included
            vis = torch.where((which >= 0)[:, None, None], real[which], vis)
        vis = vis + model.resampler.table
        loss, right = reply_loss(model, system_past(model, tok), vis, ids, labels)
        rl = loss.item()
        if step % 10 == 0:  # a little conversation without any video
            loss = loss + 0.1 * chat_loss(model, tok, random.Random(step))
        look = 0.0
        if args.exercises and not args.extra:
            ll, look = exercise_loss(model, tok, random.Random(args.seed * 100003 + step), args.exercises)
            loss = loss + 0.5 * ll
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        acc += [rl, right.float().mean().item(), look]
        step, seen = step + 1, seen + len(ids)
        if step % args.log == 0:
            print(f"{sched.elapsed()/60:6.1f}m step {step} {seen/(time.time()-t0):.0f}/s loss {acc[0]/args.log:.4f} exact {acc[1]/args.log:.3f} lookup {acc[2]/args.log:.3f}", flush=True)
            acc[:], seen, t0 = 0, 0, time.time()
        if step % 10 == 0 or p >= 1:
            save("language", model=model.state_dict(), opt=opt.state_dict(), step=step, done=sched.elapsed())
        if p >= 1:
            break


@torch.no_grad()
def look(args, model):
    """Lets tower and connector see training clips once and keeps their visual tokens for the language stage."""
    model.load_state_dict(torch.load(WORK / "vision.pt")["model"])
    rng, nrng = random.Random(args.seed + 77), np.random.default_rng(args.seed + 77)
    scenes, tokens = [], []
    sched_end = time.time() + args.minutes * 60
    while time.time() < sched_end:
        some = [data.make_scene(rng, mix=args.mix) for _ in range(8)]
        frames = torch.from_numpy(np.stack([data.clip_frames(s, nrng) for s in some]))
        scenes += some
        tokens.append((model.visual_tokens(model.features(frames)) - model.resampler.table).half())
    save("seen", scenes=scenes, tokens=torch.cat(tokens))
    print(len(scenes), "clips")


def joint(args, model):
    tok = tokenizer.load()
    opt = torch.optim.AdamW(groups([model.llm, model.tower, model.resampler], args.lr, 0.01), betas=(0.9, 0.98))
    step, done = 0, 0.0
    if (WORK / "joint.pt").exists() and args.resume:
        st = torch.load(WORK / "joint.pt")
        model.load_state_dict(st["model"]), opt.load_state_dict(st["opt"])
        step, done = st["step"], st["done"]
    else:  # put the first two stages together
        model.load_state_dict(torch.load(WORK / "vision.pt")["model"])
        lang = torch.load(WORK / "language.pt")["model"]
        model.load_state_dict({k: v for k, v in lang.items() if k.startswith("language_model")}, strict=False)
    sched = Schedule(opt, args.minutes, done)
    sched.base = [args.lr, args.lr]
    seen, t0, acc = 0, time.time(), np.zeros(6)
    for frames, slots, _, ids, labels in stream("clips", args.seed + step, args):
        p = sched.step(step)
        b = len(frames)
        with torch.set_grad_enabled(p > args.frozen):
            feats = model.features(frames)
            lat = model.resampler.chunk(feats[:, :, 1:].flatten(0, 1))
            sl, *a = slot_loss(lat, slots.flatten(0, 1))
        vis = lat.reshape(b, -1, model.c.dim) + model.resampler.table
        rl, right = reply_loss(model, system_past(model, tok), vis, ids, labels)
        loss = rl + args.slots * sl
        if step % 10 == 0:  # a little conversation without any video
            loss = loss + 0.1 * chat_loss(model, tok, random.Random(step))
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        acc += [rl.item(), right.float().mean().item(), sl.item(), *a]
        step, seen = step + 1, seen + len(ids)
        if step % args.log == 0:
            m = acc / args.log
            print(f"{sched.elapsed()/60:6.1f}m step {step} {seen/(time.time()-t0):.0f}/s reply {m[0]:.4f} exact {m[1]:.3f} | slots {m[2]:.3f} "
                  f"colour {m[3]:.3f} shape {m[4]:.3f} geo {m[5]:.3f}", flush=True)
            acc[:], seen, t0 = 0, 0, time.time()
        if step % 100 == 0 or p >= 1:
            save("joint", model=model.state_dict(), opt=opt.state_dict(), step=step, done=sched.elapsed())
        if p >= 1:
            break


def main():
    global WORK
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("stage", choices=["vision", "look", "language", "joint"])
    ap.add_argument("--minutes", type=float, default=40)
    ap.add_argument("--lr", type=float)
    ap.add_argument("--batch", type=int, default=64, help="pictures a step (vision)")
    ap.add_argument("--alone", type=float, default=0.35, help="part of the time the tower trains without the connector")
    ap.add_argument("--both", action="store_true", help="continue tower and connector together (vision, with --resume)")
    ap.add_argument("--again", action="store_true", help="resume the weights but begin a new schedule (language)")
    ap.add_argument("--real", type=float, default=0.0, help="part of the clips with tokens kept by `look` (language)")
    ap.add_argument("--extra", type=int, default=0, help="steps of exercises alone between two others (language)")
    ap.add_argument("--exercises", type=int, default=40, help="short exercises a step (language)")
    ap.add_argument("--clips", type=int, default=8)
    ap.add_argument("--questions", type=int, default=3, help="questions a clip")
    ap.add_argument("--noise", type=float, default=0.06, help="on the ideal tokens")
    ap.add_argument("--slots", type=float, default=0.5, help="weight of the slots' loss (joint)")
    ap.add_argument("--frozen", type=float, default=0.5, help="part of the time tower and connector stay frozen (joint)")
    ap.add_argument("--mix", type=lambda s: [float(x) for x in s.split(",")], default=[45, 20, 20, 15],
                    help="shares of the kinds of clips, see data.make_scene")
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--seed", type=int, default=1000)
    ap.add_argument("--log", type=int, default=50)
    ap.add_argument("--resume", action="store_true")
    ap.add_argument("--start", help="begin with the weights of an exported model.safetensors")
    ap.add_argument("--work", default="work")
    args = ap.parse_args()
    WORK = Path(args.work)
    args.lr = args.lr or {"vision": 1e-3, "language": 2e-3, "joint": 4e-4, "look": 0.0}[args.stage]
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = Model(load_config(NANO / "config.json"))
    init(model)
    if args.start:  # an exported checkpoint; optimiser and schedule begin anew
        from safetensors.torch import load_file
        model.load_state_dict({k: v.float() for k, v in load_file(args.start).items()})
    {"vision": vision, "look": look, "language": language, "joint": joint}[args.stage](args, model)


if __name__ == "__main__":
    main()
