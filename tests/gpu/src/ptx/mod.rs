//! PTX (NVIDIA's Parallel Thread Execution ISA), as far as compilers write it for this program: text to kernels, names to numbers.

mod reader;

use std::collections::HashMap;

use super::lanes::Lanewise;
use reader::{Reader, immediate, is_name, size_of, variable};

pub type Result<T> = std::result::Result<T, String>;

/// Generic addresses of a block's shared variables begin here, those of a thread's own at `LOCAL`.
pub const SHARED: u64 = 1 << 60;
pub const LOCAL: u64 = 2 << 60;

#[derive(Debug)]
pub struct Kernel {
    pub name: String,
    /// Offset and bytes of each parameter.
    pub params: Vec<(usize, usize)>,
    pub instructions: Vec<Instruction>,
    pub num_registers: usize,
    /// Shared memory, beside what a launch adds.
    pub shared_bytes: usize,
    pub local_bytes: usize,
    /// Most threads of a block that it was compiled for.
    pub max_threads: Option<u32>,
    /// It lets the next kernel begin before it has ended.
    pub lets_next_begin: bool,
}

#[derive(Debug)]
pub struct Instruction {
    /// A register, and whether it must be false.
    pub guard: Option<(u32, bool)>,
    pub op: Op,
    pub text: String,
}

#[derive(Debug, Clone, Copy)]
pub enum Operand {
    Register(u32),
    Value(u64),
    Special(Special),
}

/// Registers that know where a thread is; axes are 0, 1, 2.
#[derive(Debug, Clone, Copy)]
pub enum Special {
    Thread(u8),
    Threads(u8),
    Block(u8),
    Blocks(u8),
    Lane,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    Global,
    Shared,
    Local,
    Param,
    Generic,
}

#[derive(Debug, Clone, Copy)]
pub struct Address {
    pub base: Operand,
    pub offset: i64,
    pub space: Space,
}

#[derive(Debug)]
pub enum Op {
    /// Of each lane by itself.
    Lanewise {
        to: u32,
        of: [Operand; 3],
        function: Lanewise,
    },
    /// `{to, …} = of`, the lowest bits first.
    Split {
        to: Vec<Option<u32>>,
        of: Operand,
        bits: u32,
    },
    Join {
        to: u32,
        of: Vec<Operand>,
        bits: u32,
    },
    Select {
        to: u32,
        of: [Operand; 2],
        by: Operand,
    },
    /// As many neighbours as there are registers, of so many bytes each.
    Load {
        to: Vec<u32>,
        from: Address,
        bytes: usize,
        /// Where numbers keep their sign: the bits of the registers.
        sign_bits: Option<u32>,
    },
    Store {
        of: Vec<Operand>,
        to: Address,
        bytes: usize,
    },
    /// The old value to `to`; the new one is `function(old, of[0])`, or `of[1]` where the old one is `of[0]`.
    Atomic {
        to: Option<u32>,
        at: Address,
        bytes: usize,
        of: [Operand; 2],
        function: Option<Lanewise>,
    },
    Branch(usize),
    Exit,
    Barrier,
    Shuffle {
        to: u32,
        is_valid: Option<u32>,
        of: Operand,
        by: Operand,
        clamp: Operand,
        members: Operand,
        mode: Shuffle,
    },
    Vote {
        to: u32,
        of: Operand,
        members: Operand,
        mode: Vote,
    },
    /// `mma.m16n8k16` of f16 or bf16, summed in f32.
    Multiply {
        to: [u32; 4],
        a: [Operand; 4],
        b: [Operand; 2],
        c: [Operand; 4],
        is_bf16: bool,
    },
    LoadMatrices {
        to: [u32; 4],
        from: Address,
        is_transposed: bool,
    },
    /// `of` bytes, and zeros up to `bytes`.
    CopyAsync {
        to: Address,
        from: Address,
        bytes: usize,
        of: Operand,
    },
    CommitCopies,
    /// Until no more than so many groups are on their way.
    AwaitCopies(usize),
    AwaitPrevious,
    /// Of the warp.
    AwaitLanes(Operand),
    Nothing,
    Fail,
}

#[derive(Debug, Clone, Copy)]
pub enum Shuffle {
    Butterfly,
    Down,
    Up,
    Index,
}

#[derive(Debug, Clone, Copy)]
pub enum Vote {
    Any,
    All,
    Ballot,
}

/// A table, to be put into memory.
#[derive(Debug)]
pub struct Table {
    pub name: String,
    pub bytes: Vec<u8>,
}

/// A file of kernels. Each is read when it is asked for.
#[derive(Debug)]
pub struct Module {
    kernels: HashMap<String, String>,
    declarations: Vec<String>,
}

impl Module {
    pub fn new(text: &str) -> Module {
        let lines = text.lines().map(|line| line.split("//").next().unwrap_or(""));
        let text = lines.collect::<Vec<_>>().join("\n");
        let mut module = Module { kernels: HashMap::new(), declarations: vec![] };
        let mut rest = text.as_str();
        // Declarations end with `;`, functions with their brace.
        while let Some(at) = rest.find(['{', ';']) {
            let head = &rest[..at];
            let is_table = head.contains('=');
            if is_table || rest[at..].starts_with(';') {
                let end = rest[at..].find(';').map_or(rest.len(), |more| at + more);
                module.declarations.push(rest[..end].trim().to_owned());
                rest = rest.get(end + 1..).unwrap_or("");
                continue;
            }
            let mut depth = 0;
            let closes = |&(_, c): &(usize, char)| {
                depth += i32::from(c == '{') - i32::from(c == '}');
                depth == 0
            };
            let end = rest[at..].char_indices().find(closes).map_or(rest.len(), |(more, _)| at + more + 1);
            if let Some(start) = head.find(".entry") {
                let name = rest[start + ".entry".len()..].trim_start();
                let name = name.chars().take_while(|&c| is_name(c)).collect();
                module.kernels.insert(name, rest[start..end].to_owned());
            }
            rest = &rest[end..];
        }
        module
    }

    /// Its tables; what cannot be read as one is none.
    pub fn tables(&self) -> Vec<Table> {
        self.declarations.iter().filter_map(|text| table(text)).collect()
    }

    /// Shared variables of the whole module: name, bytes, alignment. No bytes where a launch decides on them.
    fn shared(&self) -> Vec<(String, usize, usize)> {
        let shared = |text: &String| variable(text[text.find(".shared")?..].trim()).ok();
        self.declarations.iter().filter_map(shared).collect()
    }

    /// The kernel of this name, if there is one. `tables` says where they are.
    pub fn kernel(&self, name: &str, tables: &HashMap<String, u64>) -> Result<Option<Kernel>> {
        let Some(text) = self.kernels.get(name) else { return Ok(None) };
        Reader::new(tables).kernel(name, text, &self.shared()).map(Some)
    }
}

fn table(text: &str) -> Option<Table> {
    let (declaration, values) = text.split_once('=').unwrap_or((text, ""));
    let start = declaration.find(".global").or(declaration.find(".const"))?;
    let (name, bytes, _) = variable(&declaration[start..]).ok()?;
    let size = declaration.split_whitespace().find_map(|word| size_of(word).ok())?;
    let mut all = vec![0u8; bytes];
    let values = values.trim().trim_start_matches('{').trim_end_matches('}').split(',');
    for (value, place) in values.filter_map(|value| immediate(value.trim())).zip(all.chunks_mut(size)) {
        place.copy_from_slice(&value.to_le_bytes()[..size]);
    }
    Some(Table { name, bytes: all })
}
