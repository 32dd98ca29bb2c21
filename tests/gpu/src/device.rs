//! The one device all calls go to: several that the driver shows are this one.

use std::{
    collections::{BTreeMap, HashMap},
    env,
    ffi::c_int,
    str::FromStr,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use super::{
    block::{self, Launch},
    graph::{Graph, Node, State},
    host::Host,
    ptx::{self, Kernel},
};

/// `CUresult`
pub mod status {
    use std::ffi::c_int;

    pub const SUCCESS: c_int = 0;
    pub const INVALID_VALUE: c_int = 1;
    pub const OUT_OF_MEMORY: c_int = 2;
    pub const NOT_FOUND: c_int = 500;
    pub const ILLEGAL_ADDRESS: c_int = 700;
    pub const CAPTURE_UNSUPPORTED: c_int = 900;
    pub const CAPTURE_INVALIDATED: c_int = 901;
}

/// What a program may take of shared memory without asking for more.
const MAX_SHARED_BYTES: usize = 48 << 10;
/// Of a grid in its first dimension; in the others it is 65,535.
const MAX_BLOCKS: u32 = i32::MAX as u32;

#[derive(Debug, Default)]
pub struct Device {
    pub state: State,
    pub host: Host,
    /// Of the streams that are recorded.
    pub recordings: HashMap<usize, Graph>,
    /// Kernels of each name so far.
    counts: BTreeMap<String, u64>,
    num_launches: u64,
    is_lost: bool,
}

/// A file of kernels that was loaded.
pub struct Loaded {
    pub module: ptx::Module,
    pub tables: HashMap<String, u64>,
}

static DEVICE: OnceLock<Mutex<Device>> = OnceLock::new();

/// The device, for as long as nobody else has it.
pub fn device() -> MutexGuard<'static, Device> {
    DEVICE.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}

/// A number from the environment.
pub fn setting<T: FromStr>(name: &str, default: T) -> T {
    env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

pub fn can_record() -> bool {
    static CAN: OnceLock<bool> = OnceLock::new();
    *CAN.get_or_init(|| env::var_os("GPU_CANNOT_RECORD").is_none())
}

pub fn total_bytes() -> usize {
    static BYTES: OnceLock<usize> = OnceLock::new();
    *BYTES.get_or_init(|| setting("GPU_MIB", 4096) << 20)
}

pub fn trace(call: impl FnOnce() -> String) {
    static IS_ON: OnceLock<bool> = OnceLock::new();
    if *IS_ON.get_or_init(|| env::var_os("GPU_TRACE").is_some()) {
        eprintln!("gpu: {}", call());
    }
}

impl Device {
    /// An error that came up is the answer to everything from then on.
    pub fn health(&self) -> c_int {
        if self.is_lost { status::ILLEGAL_ADDRESS } else { status::SUCCESS }
    }

    pub fn allocate(&mut self, bytes: usize) -> Result<u64, c_int> {
        match self.health() {
            status::SUCCESS if self.state.memory.used() + bytes > total_bytes() => Err(status::OUT_OF_MEMORY),
            status::SUCCESS => Ok(self.state.memory.allocate(bytes)),
            error => Err(error),
        }
    }

    /// Does it, or keeps it for the stream's recording.
    pub fn enqueue(&mut self, stream: usize, node: Node) -> c_int {
        match self.recordings.get_mut(&stream) {
            _ if self.is_lost => self.health(),
            Some(_) if !can_record() => status::CAPTURE_INVALIDATED,
            Some(graph) => {
                graph.nodes.push(node);
                status::SUCCESS
            }
            None => self.run(&node),
        }
    }

    pub fn start(&mut self, graph: &Graph) -> c_int {
        self.state.unfinished.begin(false);
        graph
            .nodes
            .iter()
            .map(|node| self.run(node))
            .find(|&code| code != status::SUCCESS)
            .unwrap_or(self.health())
    }

    fn run(&mut self, node: &Node) -> c_int {
        if matches!(node, Node::Kernel(_)) {
            static FAILS_AFTER: OnceLock<u64> = OnceLock::new();
            self.num_launches += 1;
            self.is_lost |=
                self.num_launches > *FAILS_AFTER.get_or_init(|| setting("GPU_FAILS_AFTER", u64::MAX));
        }
        if !self.is_lost
            && let Err(why) = node.run(&mut self.state)
        {
            eprintln!("gpu: {why}");
            self.is_lost = true;
        }
        self.health()
    }

    /// A kernel with its arguments, one after the other as its parameters lie.
    pub fn launch(
        &mut self,
        kernel: Arc<Kernel>,
        [blocks, threads]: [[u32; 3]; 2],
        (dynamic_shared, stream): (usize, usize),
        (params, is_early): (Vec<u8>, bool),
    ) -> c_int {
        trace(|| format!("{} {blocks:?} {threads:?}", kernel.name));
        let [x, y, z] = blocks;
        let fits = (1..=MAX_BLOCKS).contains(&x) && [y, z].iter().all(|n| (1..=0xffff).contains(n));
        if kernel.shared_bytes + dynamic_shared > MAX_SHARED_BYTES || !fits {
            eprintln!("gpu: {} cannot be started: {blocks:?}, {dynamic_shared} shared bytes", kernel.name);
            return status::INVALID_VALUE;
        }
        *self.counts.entry(kernel.name.clone()).or_default() += 1;
        self.enqueue(
            stream,
            Node::Kernel(Arc::new(move |state| {
                let (kernel, params) = (&*kernel, &*params);
                block::run(&Launch { kernel, blocks, threads, dynamic_shared, params, is_early }, state)
            })),
        )
    }
}

/// Says at the end of the program how often each kernel was called, if that is asked for.
pub fn report_at_exit() {
    unsafe extern "C" {
        fn atexit(function: extern "C" fn()) -> c_int;
    }
    extern "C" fn report() {
        for (name, count) in &device().counts {
            eprintln!("gpu: {count} x {name}");
        }
    }
    static ONCE: OnceLock<()> = OnceLock::new();
    if env::var_os("GPU_COUNTS").is_some() {
        // SAFETY: the function is the C library's.
        ONCE.get_or_init(|| _ = unsafe { atexit(report) });
    }
}
