//! A kernel's text to instructions.

use std::collections::HashMap;

use super::{
    super::lanes::lanewise, Address, Instruction, Kernel, LOCAL, Op, Operand, Result, SHARED, Shuffle, Space,
    Special, Vote,
};

pub struct Reader {
    registers: HashMap<String, u32>,
    /// Bits of registers that were declared, by their name or, where they are many, by what their names begin with.
    bits: HashMap<String, u32>,
    /// Addresses of variables, parameters and tables, each in its space.
    symbols: HashMap<String, u64>,
    labels: HashMap<String, usize>,
}

impl Reader {
    pub fn new(tables: &HashMap<String, u64>) -> Self {
        Reader {
            registers: HashMap::new(),
            bits: HashMap::new(),
            symbols: tables.clone(),
            labels: HashMap::new(),
        }
    }

    /// From `.entry` to the closing brace; `of_module` are the shared variables of the module.
    pub fn kernel(&mut self, name: &str, text: &str, of_module: &[(String, usize, usize)]) -> Result<Kernel> {
        let open = text.find('{').ok_or("a kernel without body")?;
        let head = &text[..open];
        let params = self.params(head)?;
        let max_threads = head.find(".maxntid").map(|start| {
            let sizes: String = head[start + 8..].chars().take_while(|&c| c != '.').collect();
            sizes.split(',').filter_map(|size| size.trim().parse::<u32>().ok()).product()
        });
        let (mut shared, mut local) = (0, 0);
        let place = |symbols: &mut HashMap<String, u64>, end: &mut usize, name: &str, bytes, align| {
            *end = end.next_multiple_of(align);
            symbols.insert(name.to_owned(), *end as u64);
            *end += bytes;
        };
        let mut lines = vec![];
        for statement in statements(&text[open + 1..text.len() - 1]) {
            if let Some(label) = statement.strip_suffix(':') {
                self.labels.insert(label.to_owned(), lines.len());
            } else if statement.starts_with(".shared") || statement.starts_with(".local") {
                let (name, bytes, align) = variable(statement)?;
                let end = if statement.starts_with(".shared") { &mut shared } else { &mut local };
                place(&mut self.symbols, end, &name, bytes, align);
            } else if let Some(registers) = statement.strip_prefix(".reg") {
                self.declare(registers)?;
            } else if !statement.starts_with('.') {
                lines.push(statement);
            }
        }
        let own = of_module.iter().filter(|(name, bytes, _)| *bytes > 0 && text.contains(name.as_str()));
        for (name, bytes, align) in own {
            place(&mut self.symbols, &mut shared, name, *bytes, *align);
        }
        shared = shared.next_multiple_of(16);
        for (name, ..) in of_module.iter().filter(|(_, bytes, _)| *bytes == 0) {
            self.symbols.insert(name.clone(), shared as u64);
        }
        let read = |line: &&str| self.instruction(line).map_err(|why| format!("{name}: `{line}`: {why}"));
        let mut instructions = lines.iter().map(read).collect::<Result<Vec<_>>>()?;
        instructions.push(Instruction { guard: None, op: Op::Exit, text: "the end".into() });
        Ok(Kernel {
            name: name.to_owned(),
            params,
            instructions,
            num_registers: self.registers.len(),
            shared_bytes: shared,
            local_bytes: local,
            max_threads,
            lets_next_begin: text.contains("griddepcontrol.launch_dependents"),
        })
    }

    fn params(&mut self, head: &str) -> Result<Vec<(usize, usize)>> {
        let (Some(start), Some(end)) = (head.find('('), head.rfind(')')) else { return Ok(vec![]) };
        let mut params = vec![];
        let mut at = 0usize;
        for text in head[start + 1..end].split(',').filter(|text| !text.trim().is_empty()) {
            let (name, bytes, align) = variable(text)?;
            at = at.next_multiple_of(align);
            self.symbols.insert(name, at as u64);
            params.push((at, bytes));
            at += bytes;
        }
        Ok(params)
    }

    /// `.b32 %r<57>`, or `.pred p, q`.
    fn declare(&mut self, text: &str) -> Result<()> {
        let (kind, names) = text.trim().split_once(char::is_whitespace).ok_or("registers without type")?;
        let bits = if kind == ".pred" { 1 } else { 8 * size_of(kind)? as u32 };
        for name in names.split(',') {
            let name = name.split('<').next().unwrap_or("").trim();
            self.bits.insert(name.to_owned(), bits);
        }
        Ok(())
    }

    fn bits_of(&self, name: &str) -> Option<u32> {
        let family = name.trim_end_matches(|c: char| c.is_ascii_digit());
        self.bits.get(name).or(self.bits.get(family)).copied()
    }

    fn register(&mut self, name: &str) -> Result<u32> {
        self.bits_of(name).ok_or_else(|| format!("{name} is no register"))?;
        let next = self.registers.len() as u32;
        Ok(*self.registers.entry(name.to_owned()).or_insert(next))
    }

    fn operand(&mut self, text: &str) -> Result<Operand> {
        let (name, axis) = match text.rsplit_once('.') {
            Some((name, "x")) => (name, 0),
            Some((name, "y")) => (name, 1),
            Some((name, "z")) => (name, 2),
            _ => (text, 0),
        };
        Ok(match name {
            "%tid" => Operand::Special(Special::Thread(axis)),
            "%ntid" => Operand::Special(Special::Threads(axis)),
            "%ctaid" => Operand::Special(Special::Block(axis)),
            "%nctaid" => Operand::Special(Special::Blocks(axis)),
            "%laneid" => Operand::Special(Special::Lane),
            "WARP_SZ" => Operand::Value(32),
            _ => match (immediate(text), self.symbols.get(text)) {
                (Some(value), _) | (None, Some(&value)) => Operand::Value(value),
                _ => Operand::Register(self.register(text)?),
            },
        })
    }

    fn address(&mut self, text: &str, space: Space) -> Result<Address> {
        let inner = text.trim_start_matches('[').trim_end_matches(']');
        let (base, offset) = match inner.split_once('+') {
            Some((base, offset)) => (base, immediate(offset).ok_or("an offset that is no number")? as i64),
            None => (inner, 0),
        };
        Ok(Address { base: self.operand(base.trim())?, offset, space })
    }

    /// `{a, b}`, or one.
    fn vector(&mut self, text: &str) -> Result<Vec<Operand>> {
        let inner = text.trim_start_matches('{').trim_end_matches('}');
        inner.split(',').map(|one| self.operand(one.trim())).collect()
    }

    fn targets(&mut self, text: &str) -> Result<Vec<u32>> {
        let register = |operand| match operand {
            Operand::Register(register) => Ok(register),
            _ => Err("a result that is no register".to_owned()),
        };
        self.vector(text)?.into_iter().map(register).collect()
    }

    fn target(&mut self, text: &str) -> Result<u32> {
        Ok(self.targets(text)?[0])
    }

    fn instruction(&mut self, line: &str) -> Result<Instruction> {
        let (guard, line) = match line.strip_prefix('@') {
            Some(rest) => {
                let (name, rest) = rest.split_once(char::is_whitespace).ok_or("a guard of nothing")?;
                (Some((self.register(name.trim_start_matches('!'))?, name.starts_with('!'))), rest.trim())
            }
            None => (None, line),
        };
        let (opcode, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let op = self.op(&Opcode::new(opcode), &split(rest))?;
        Ok(Instruction { guard, op, text: line.to_owned() })
    }

    fn op(&mut self, opcode: &Opcode, operands: &[String]) -> Result<Op> {
        let has = |modifier: &str| opcode.has(modifier);
        let at = |i: usize| operands.get(i).map(String::as_str).ok_or_else(|| format!("no operand {i}"));
        Ok(match opcode.name() {
            "bra" => Op::Branch(*self.labels.get(at(0)?).ok_or("an unknown label")?),
            "ret" | "exit" => Op::Exit,
            "trap" | "call" => Op::Fail,
            "bar" | "barrier" if has("warp") => Op::AwaitLanes(self.operand(at(0)?)?),
            "bar" | "barrier" if opcode.kind() == "sync" && operands == ["0"] => Op::Barrier,
            "griddepcontrol" if has("wait") => Op::AwaitPrevious,
            "membar" | "fence" | "griddepcontrol" | "prefetch" => Op::Nothing,
            "cp" if has("commit_group") => Op::CommitCopies,
            "cp" if has("wait_group") => {
                Op::AwaitCopies(immediate(at(0)?).ok_or("a number of groups")? as usize)
            }
            "cp" if has("async") && has("shared") => Op::CopyAsync {
                to: self.address(at(0)?, Space::Shared)?,
                from: self.address(at(1)?, Space::Global)?,
                bytes: immediate(at(2)?).ok_or("a number of bytes")? as usize,
                of: self.operand(at(3).or(at(2))?)?,
            },
            "ld" => {
                let name = at(0)?.trim_start_matches('{').split([',', '}']).next().unwrap_or("");
                let bits = self.bits_of(name).ok_or("no register")?;
                Op::Load {
                    to: self.targets(at(0)?)?,
                    from: self.address(at(1)?, opcode.space())?,
                    bytes: size_of(opcode.kind())?,
                    sign_bits: opcode.kind().starts_with('s').then_some(bits),
                }
            }
            // What a function is called with: here only one that gives up.
            "st" if has("param") => Op::Nothing,
            "st" => Op::Store {
                to: self.address(at(0)?, opcode.space())?,
                of: self.vector(at(1)?)?,
                bytes: size_of(opcode.kind())?,
            },
            "atom" | "red" => self.atomic(opcode, operands)?,
            "shfl" => self.shuffle(opcode, operands)?,
            "vote" => Op::Vote {
                to: self.target(at(0)?)?,
                of: self.operand(at(1)?)?,
                members: self.operand(at(2)?)?,
                mode: match () {
                    () if has("ballot") => Vote::Ballot,
                    () if has("any") => Vote::Any,
                    () if has("all") => Vote::All,
                    () => return Err("an unknown vote".into()),
                },
            },
            "mma" if has("m16n8k16") && has("row") && has("col") && opcode.kind() == "f32" => Op::Multiply {
                to: four(self.targets(at(0)?)?)?,
                a: four(self.vector(at(1)?)?)?,
                b: self.vector(at(2)?)?.try_into().map_err(|_| "not two registers")?,
                c: four(self.vector(at(3)?)?)?,
                is_bf16: has("bf16"),
            },
            "ldmatrix" if has("m8n8") && has("x4") => Op::LoadMatrices {
                to: four(self.targets(at(0)?)?)?,
                from: self.address(at(1)?, Space::Shared)?,
                is_transposed: has("trans"),
            },
            "mov" if at(0)?.starts_with('{') => {
                let names = at(0)?.trim_matches(['{', '}']).split(',').map(str::trim);
                let to = names.map(|name| (name != "_").then(|| self.register(name)).transpose());
                let to = to.collect::<Result<Vec<_>>>()?;
                let bits = 8 * size_of(opcode.kind())? as u32 / to.len() as u32;
                Op::Split { to, of: self.operand(at(1)?)?, bits }
            }
            "mov" if at(1)?.starts_with('{') => {
                let of = self.vector(at(1)?)?;
                let bits = 8 * size_of(opcode.kind())? as u32 / of.len() as u32;
                Op::Join { to: self.target(at(0)?)?, of, bits }
            }
            "selp" => {
                let of = [self.operand(at(1)?)?, self.operand(at(2)?)?];
                let bits = 8 * size_of(opcode.kind())?;
                let narrow = |operand| match operand {
                    Operand::Value(value) => Operand::Value(value & u64::MAX >> (64 - bits)),
                    other => other,
                };
                Op::Select { to: self.target(at(0)?)?, of: of.map(narrow), by: self.operand(at(3)?)? }
            }
            _ => self.lanewise(opcode, operands)?,
        })
    }

    fn lanewise(&mut self, opcode: &Opcode, operands: &[String]) -> Result<Op> {
        let [to, operands @ ..] = operands else { return Err("no operands".into()) };
        let to = self.target(to)?;
        let mut of = [Operand::Value(0); 3];
        let function = match (opcode.name(), operands) {
            ("cvta", [address]) => {
                let base = match opcode.space() {
                    Space::Shared => SHARED,
                    Space::Local => LOCAL,
                    _ => 0,
                };
                let shift = if opcode.has("to") { base.wrapping_neg() } else { base };
                of = [self.operand(address)?, Operand::Value(shift), Operand::Value(0)];
                lanewise(&["add", "u64"]).ok_or("an unknown instruction")?
            }
            ("bfi", [a, b, position, length]) => {
                let number = |text: &str| immediate(text).ok_or("a place that is no number");
                let place = number(position)? | number(length)? << 32;
                of = [self.operand(a)?, self.operand(b)?, Operand::Value(place)];
                lanewise(&opcode.parts).ok_or("an unknown instruction")?
            }
            ("setp", [_, _, _]) => return Err("a comparison joined with another".into()),
            (_, operands) if operands.len() <= 3 => {
                for (of, text) in of.iter_mut().zip(operands) {
                    *of = match (self.operand(text)?, opcode.kind()) {
                        (Operand::Value(value), "pred") => Operand::Value(value & 1),
                        (operand, _) => operand,
                    };
                }
                lanewise(&opcode.parts).ok_or("an unknown instruction")?
            }
            _ => return Err("too many operands".into()),
        };
        Ok(Op::Lanewise { to, of, function })
    }

    fn atomic(&mut self, opcode: &Opcode, operands: &[String]) -> Result<Op> {
        let (to, operands) = match (opcode.name(), operands) {
            ("atom", [to, rest @ ..]) => (Some(self.target(to)?), rest),
            (_, all) => (None, all),
        };
        let [at, of @ ..] = operands else { return Err("no address".into()) };
        let mut values = [Operand::Value(0); 2];
        for (value, text) in values.iter_mut().zip(of) {
            *value = self.operand(text)?;
        }
        let functions = ["add", "min", "max", "and", "or", "xor", "exch"];
        let function = match functions.into_iter().find(|name| opcode.has(name)) {
            Some(name) => Some(lanewise(&[name, opcode.kind()]).ok_or("an unknown atomic")?),
            None if opcode.has("cas") => None,
            None => return Err("an unknown atomic".into()),
        };
        let at = self.address(at, opcode.space())?;
        Ok(Op::Atomic { to, at, bytes: size_of(opcode.kind())?, of: values, function })
    }

    fn shuffle(&mut self, opcode: &Opcode, operands: &[String]) -> Result<Op> {
        let [to, of, by, clamp, members] = operands else { return Err("not five operands".into()) };
        let (to, is_valid) = match to.split_once('|') {
            Some((to, is_valid)) => (to, Some(self.target(is_valid)?)),
            None => (to.as_str(), None),
        };
        let mode = match () {
            () if opcode.has("bfly") => Shuffle::Butterfly,
            () if opcode.has("down") => Shuffle::Down,
            () if opcode.has("up") => Shuffle::Up,
            () => Shuffle::Index,
        };
        let [of, by] = [self.operand(of)?, self.operand(by)?];
        let [clamp, members] = [self.operand(clamp)?, self.operand(members)?];
        Ok(Op::Shuffle { to: self.target(to)?, is_valid, of, by, clamp, members, mode })
    }
}

/// `ld.global.v2.u32`
struct Opcode<'a> {
    parts: Vec<&'a str>,
}

impl<'a> Opcode<'a> {
    fn new(text: &'a str) -> Self {
        Opcode { parts: text.split('.').collect() }
    }

    fn name(&self) -> &'a str {
        self.parts[0]
    }

    /// Its type, where it has one.
    fn kind(&self) -> &'a str {
        self.parts[self.parts.len() - 1]
    }

    fn has(&self, modifier: &str) -> bool {
        self.parts[1..].contains(&modifier)
    }

    fn space(&self) -> Space {
        match () {
            () if self.has("global") || self.has("const") => Space::Global,
            () if self.has("shared") => Space::Shared,
            () if self.has("local") => Space::Local,
            () if self.has("param") => Space::Param,
            () => Space::Generic,
        }
    }
}

/// Bytes of a type.
pub fn size_of(kind: &str) -> Result<usize> {
    Ok(match kind.trim_start_matches('.') {
        "b8" | "u8" | "s8" => 1,
        "b16" | "u16" | "s16" | "f16" | "bf16" => 2,
        "b32" | "u32" | "s32" | "f32" => 4,
        "b64" | "u64" | "s64" | "f64" => 8,
        other => return Err(format!("an unknown type {other}")),
    })
}

pub fn is_name(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '_' | '$' | '%')
}

/// A variable's name, bytes and alignment: `.shared .align 4 .b8 name[128]`.
pub fn variable(text: &str) -> Result<(String, usize, usize)> {
    let (mut align, mut size) = (None, None);
    let mut words = text.split_whitespace();
    while let Some(word) = words.next() {
        if word == ".align" {
            align = words.next().and_then(|number| number.parse().ok());
        } else if let Ok(bytes) = size_of(word) {
            size = Some(bytes);
        } else if !word.starts_with('.') {
            let (name, count) = match word.split_once('[') {
                Some((name, count)) => (name, count.trim_end_matches(']').parse().unwrap_or(0)),
                None => (word, 1),
            };
            let size = size.ok_or("a variable without type")?;
            return Ok((name.to_owned(), size * count, align.unwrap_or(size)));
        }
    }
    Err(format!("no variable: {text}"))
}

/// A number: decimal, hexadecimal, or the bits of a float.
pub fn immediate(text: &str) -> Option<u64> {
    if let Some(bits) = ["0f", "0F", "0d", "0D"].iter().find_map(|prefix| text.strip_prefix(prefix)) {
        return u64::from_str_radix(bits, 16).ok();
    }
    let (text, is_negative) = text.strip_prefix('-').map_or((text, false), |text| (text, true));
    let text = text.trim_end_matches('U');
    let number = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok()?,
        None => text.parse::<u64>().ok()?,
    };
    Some(if is_negative { number.wrapping_neg() } else { number })
}

fn four<T>(all: Vec<T>) -> Result<[T; 4]> {
    all.try_into().map_err(|_| "not four registers".to_owned())
}

/// At commas that are in no brackets.
fn split(text: &str) -> Vec<String> {
    let mut depth = 0;
    let mut parts = vec![String::new()];
    for c in text.chars() {
        depth += i32::from(matches!(c, '{' | '[')) - i32::from(matches!(c, '}' | ']'));
        match c {
            ',' if depth == 0 => parts.push(String::new()),
            c if !c.is_whitespace() => parts.last_mut().expect("there is one").push(c),
            _ => {}
        }
    }
    parts.retain(|part| !part.is_empty());
    parts
}

/// Statements without their `;`, and labels with their `:`. Braces of scopes are of no account.
fn statements(text: &str) -> Vec<&str> {
    let mut all = vec![];
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let name_ends = rest.find(|c| !is_name(c)).unwrap_or(rest.len());
        let end = match rest.as_bytes()[0] {
            b'{' | b'}' => 0,
            _ if rest[name_ends..].starts_with(':') => name_ends + 1,
            _ => rest.find(';').unwrap_or(rest.len()),
        };
        if end > 0 {
            all.push(rest[..end].trim());
        }
        // A label ends with itself; what else ends has something behind it.
        let skipped = usize::from(!rest[..end].ends_with(':'));
        rest = rest.get(end + skipped..).unwrap_or("").trim_start();
    }
    all
}
