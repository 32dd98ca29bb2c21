//! `tinyllava bench engine`: the engine alone, without HTTP, ffmpeg and tokenizer.
//!
//! Encodes a video of noise, prefills a prompt, decodes batches of growing size, and compares what was achieved with what
//! this machine's own matrix product and memory reach in the same run.

use std::{
    io::Write,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use anyhow::{Context, bail};
use serde_json::json;

use crate::{
    cli::{
        options::ModelOptions,
        start::{Started, start},
        target::Target,
    },
    config::EngineConfig,
    engine::{EngineHandle, NewSequence, StepObserver, StepReport, TokenEvent, TokenStream, VideoInput},
    model::{
        FrameBatch, ModelShape, checkpoint::Checkpoint, config::ModelConfig, device, layers::WeightFormat,
        machine,
    },
    scheduler::{SamplingParams, TokenId, VISUAL_TOKEN},
};

/// What to time.
#[derive(Debug, clap::Args)]
pub struct EngineArgs {
    #[command(flatten)]
    model: ModelOptions,
    /// Tokens of the prompt, the video's among them [default: the video's and 63 more].
    #[arg(long, value_name = "N")]
    prompt_tokens: Option<usize>,
    /// Sequences decoded together.
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "1,8,64")]
    batch: Vec<usize>,
    /// Tokens each of them generates.
    #[arg(long, value_name = "N", default_value_t = 32)]
    decode_steps: usize,
    /// Whole requests at once, each with a video of its own: encode, prefill and --max-tokens.
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    requests: Vec<usize>,
    /// Tokens each of those generates.
    #[arg(long, value_name = "N", default_value_t = 64)]
    max_tokens: usize,
    /// How often everything is repeated; medians are reported.
    #[arg(long, value_name = "N", default_value_t = 5)]
    repeat: usize,
    /// Write the numbers to this file as well.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Keeps every step's report, and when it came.
#[derive(Debug, Clone, Default)]
struct Reports(Arc<Mutex<Vec<(Instant, StepReport)>>>);

impl StepObserver for Reports {
    fn step(&mut self, report: &StepReport) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((Instant::now(), *report));
    }
}

impl Reports {
    fn take(&self) -> Vec<(Instant, StepReport)> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// One line of the table.
struct Row {
    what: String,
    seconds: f64,
    tokens_per_second: Option<f64>,
    ops: f64,
    /// Weights and cache read from memory.
    bytes: f64,
}

/// Runs everything and prints the table to standard output.
///
/// # Errors
/// When the model cannot be loaded or a step fails.
pub async fn bench_engine(args: &EngineArgs) -> anyhow::Result<()> {
    let reports = Reports::default();
    let largest = args.batch.iter().chain(&args.requests).copied().max().unwrap_or(1).max(1);
    let config =
        args.model.engine(EngineConfig { max_running_sequences: largest, ..EngineConfig::default() });
    let started = start(&args.model, config, Box::new(reports.clone()), Box::new(())).await?;
    let checkpoint = Checkpoint::open(&args.model.model)?;
    let (model, format) = (checkpoint.config, args.model.weight_format(&checkpoint.weights));
    let bench = Bench { args, started, reports, model };
    let mut rows = bench.encode_and_prefill().await?;
    for &batch in &args.batch {
        rows.push(bench.decode(batch.max(1)).await?);
    }
    for &requests in &args.requests {
        rows.push(bench.requests(requests.max(1)).await?);
    }
    let machine = Machine::measured(format, bench.started.target.as_ref())?;
    print(&rows, &machine, &mut std::io::stdout())?;
    if let Some(path) = &args.json {
        let json = to_json(&rows, &machine);
        std::fs::write(path, format!("{json:#}\n"))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// Side of the matrices whose product a device is measured by, and bytes of its copy.
const DEVICE_PRODUCT_SIDE: usize = 8192;
const DEVICE_COPY_BYTES: usize = 1 << 30;

struct Machine {
    /// What was measured.
    what: String,
    ops: f64,
    bytes: f64,
}

impl Machine {
    fn measured(format: WeightFormat, target: Option<&Target>) -> anyhow::Result<Self> {
        if let Some(target) = target {
            let Target { device, dtype, .. } = target;
            return Ok(Machine {
                what: format!("{}: product", target.describe()?),
                ops: device::machine::product_ops_per_second(device, *dtype, DEVICE_PRODUCT_SIDE)?,
                bytes: device::machine::copy_bytes_per_second(device, DEVICE_COPY_BYTES)?,
            });
        }
        let threads = rayon::current_num_threads();
        Ok(Machine {
            what: format!("this machine, {threads} threads, weights {format:?}: product"),
            ops: machine::product_ops_per_second(format),
            bytes: machine::read_bytes_per_second(),
        })
    }
}

struct Bench<'a> {
    args: &'a EngineArgs,
    started: Started,
    reports: Reports,
    model: ModelConfig,
}

impl Bench<'_> {
    fn shape(&self) -> &ModelShape {
        &self.started.shape
    }

    fn num_prompt_tokens(&self) -> usize {
        let visual = self.shape().visual_tokens;
        self.args.prompt_tokens.unwrap_or(visual + 63).max(visual + 1)
    }

    /// A question about a video of noise that no other `seed` has.
    fn sequence(&self, seed: u64, max_tokens: usize) -> NewSequence {
        let (size, visual) = (self.shape().image_size, self.shape().visual_tokens);
        let num_bytes = self.shape().num_frames * size * size * 3;
        let noise = |i: u64| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(seed) >> 32) as u8;
        let frames = FrameBatch { rgb: (0..num_bytes as u64).map(noise).collect(), size };
        let mut digest = [0; 32];
        digest[..8].copy_from_slice(&seed.to_le_bytes());
        let text = (visual..self.num_prompt_tokens()).map(|i| (i * 31 % 251) as TokenId);
        NewSequence {
            token_ids: std::iter::repeat_n(VISUAL_TOKEN, visual).chain(text).collect(),
            videos: vec![VideoInput { span: 0..visual, digest, frames }],
            cache_salt: None,
            sampling: SamplingParams { ignore_eos: true, seed, ..SamplingParams::greedy(max_tokens) },
            guide: None,
        }
    }

    async fn encode_and_prefill(&self) -> anyhow::Result<Vec<Row>> {
        let (mut encode, mut prefill) = (Vec::new(), Vec::new());
        for repeat in 0..=self.args.repeat {
            let streams = vec![submit(&self.started.engine, self.sequence(repeat as u64, 1))?];
            finish(streams).await?;
            let reports = self.reports.take();
            // The first is a warm-up.
            if repeat > 0 {
                encode.push(reports.iter().map(|(_, report)| report.encode_seconds).sum());
                prefill.push(reports.iter().map(|(_, report)| report.compute_seconds).sum());
            }
        }
        let (tokens, frames) = (self.num_prompt_tokens(), self.shape().num_frames);
        let prefill = median(prefill);
        Ok(vec![
            Row {
                what: format!("encode {frames} frames"),
                seconds: median(encode),
                tokens_per_second: None,
                ops: self.model.encode_ops(frames),
                bytes: 0.0,
            },
            Row {
                what: format!("prefill {tokens}"),
                seconds: prefill,
                tokens_per_second: Some(tokens as f64 / prefill),
                ops: self.model.prefill_ops(tokens),
                bytes: 0.0,
            },
        ])
    }

    /// All sequences ask about the same prompt, which is computed once.
    async fn decode(&self, batch: usize) -> anyhow::Result<Row> {
        let mut steps = Vec::new();
        for _ in 0..self.args.repeat {
            // Made once: a device would be done with the first before the last was there.
            // One token of the prompt, and one step more than there are times from one to the next.
            let sequences = vec![self.sequence(0, self.args.decode_steps + 2); batch];
            let streams = sequences
                .into_iter()
                .map(|sequence| submit(&self.started.engine, sequence))
                .collect::<Result<_, _>>()?;
            finish(streams).await?;
            // From one to the next: a device computes a step while the host is at the one before it.
            let reports = self.reports.take();
            let is_pure = |step: &StepReport| step.num_prefill_tokens == 0 && step.num_decodes == batch;
            let pairs = reports.windows(2).filter(|pair| pair.iter().all(|(_, step)| is_pure(step)));
            steps.extend(pairs.map(|pair| (pair[1].0 - pair[0].0).as_secs_f64()));
        }
        let seconds = median(steps);
        let context = self.num_prompt_tokens() + self.args.decode_steps / 2;
        Ok(Row {
            what: format!("decode x {batch}"),
            seconds,
            tokens_per_second: Some(batch as f64 / seconds),
            ops: self.model.decode_ops(batch, context),
            bytes: self.started.decode_bytes as f64,
        })
    }

    /// What `num` clients get who come at once with videos that nobody asked about before, frames in hand.
    async fn requests(&self, num: usize) -> anyhow::Result<Row> {
        let mut times = Vec::new();
        for repeat in 0..self.args.repeat {
            // Seeds that no other part uses.
            let seeds = (0..num).map(|i| ((1 + repeat) << 32 | num << 16 | i) as u64);
            let sequences: Vec<_> = seeds.map(|seed| self.sequence(seed, self.args.max_tokens)).collect();
            let started = Instant::now();
            let streams = sequences.into_iter().map(|sequence| submit(&self.started.engine, sequence));
            finish(streams.collect::<Result<_, _>>()?).await?;
            times.push(started.elapsed().as_secs_f64());
        }
        self.reports.take();
        let seconds = median(times);
        let tokens = num * self.args.max_tokens;
        Ok(Row {
            what: format!("{num} whole requests"),
            seconds,
            tokens_per_second: Some(tokens as f64 / seconds),
            ops: num as f64
                * (self.model.encode_ops(self.shape().num_frames)
                    + self.model.prefill_ops(self.num_prompt_tokens())
                    + self.args.max_tokens as f64 * self.model.decode_ops(1, self.num_prompt_tokens())),
            bytes: 0.0,
        })
    }
}

fn submit(engine: &EngineHandle, sequence: NewSequence) -> anyhow::Result<TokenStream> {
    Ok(engine.reserve()?.submit(sequence)?)
}

async fn finish(streams: Vec<TokenStream>) -> anyhow::Result<()> {
    for mut stream in streams {
        loop {
            match stream.next().await {
                Some(TokenEvent::Finished(_)) => break,
                Some(TokenEvent::Failed(error)) => bail!("a step failed: {error}"),
                Some(_) => {}
                None => bail!("the engine has stopped"),
            }
        }
    }
    Ok(())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn print(rows: &[Row], machine: &Machine, out: &mut impl Write) -> anyhow::Result<()> {
    writeln!(
        out,
        "{:<18} {:>10} {:>10} {:>9} {:>6} {:>7} {:>6}",
        "", "ms", "tokens/s", "GFLOP/s", "of max", "GB/s", "of max"
    )?;
    for row in rows {
        let rate = row.tokens_per_second.map_or(String::new(), |rate| format!("{rate:.1}"));
        let (ops, bytes) = (row.ops / row.seconds, row.bytes / row.seconds);
        let percent = |share: f64| format!("{:.0} %", share * 100.0);
        let (gigabytes, share) = match row.bytes > 0.0 {
            true => (format!("{:.1}", bytes / 1e9), percent(bytes / machine.bytes)),
            false => (String::new(), String::new()),
        };
        writeln!(
            out,
            "{:<18} {:>10.2} {:>10} {:>9.1} {:>6} {:>7} {:>6}",
            row.what,
            row.seconds * 1e3,
            rate,
            ops / 1e9,
            percent(ops / machine.ops),
            gigabytes,
            share
        )?;
    }
    writeln!(
        out,
        "{} {:.1} GFLOP/s, memory {:.1} GB/s",
        machine.what,
        machine.ops / 1e9,
        machine.bytes / 1e9
    )?;
    Ok(())
}

fn to_json(rows: &[Row], machine: &Machine) -> serde_json::Value {
    let row = |row: &Row| {
        json!({
            "what": row.what,
            "ms": row.seconds * 1e3,
            "tokens_per_second": row.tokens_per_second,
            "gflops": row.ops / row.seconds / 1e9,
            "gbytes_per_second": row.bytes / row.seconds / 1e9,
        })
    };
    json!({
        "rows": rows.iter().map(row).collect::<Vec<_>>(),
        "machine": {
            "what": machine.what,
            "threads": rayon::current_num_threads(),
            "gflops": machine.ops / 1e9,
            "gbytes_per_second": machine.bytes / 1e9,
        },
    })
}
