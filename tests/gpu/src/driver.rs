//! The driver's functions, as far as they are called. What is put into a stream is done at once.
#![allow(non_snake_case, clippy::missing_safety_doc)]

use std::{
    collections::HashMap,
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use super::{
    device::{
        Loaded, can_record, device, report_at_exit, setting,
        status::{
            CAPTURE_INVALIDATED, CAPTURE_UNSUPPORTED, ILLEGAL_ADDRESS, INVALID_VALUE, NOT_FOUND,
            OUT_OF_MEMORY, SUCCESS,
        },
        total_bytes, trace,
    },
    graph::{Graph, Node, State},
    ptx::{self, Kernel},
};

/// What the driver calls a context and a pool here.
const THE_ONLY_ONE: usize = 1;

unsafe fn put<T>(place: *mut T, value: T) -> c_int {
    // SAFETY: the caller has a place for it.
    unsafe { place.write(value) };
    SUCCESS
}

/// What the driver gives out and is given back.
fn keep<T>(value: T) -> usize {
    Box::into_raw(Box::new(value)) as usize
}

/// The stream of calls that name none.
const NO_STREAM: usize = 0;

/// Bytes from one place to another, of which those on the device must be there.
fn copy(stream: usize, to: u64, from: u64, bytes: usize, on_device: &'static [fn(u64, u64) -> u64]) -> c_int {
    device().enqueue(
        stream,
        Node::Copy(Arc::new(move |state: &mut State| {
            on_device.iter().try_for_each(|which| state.memory.check(which(to, from), bytes))?;
            // SAFETY: both have so many bytes: the device's were looked at, the host's are the caller's.
            unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
            Ok(())
        })),
    )
}

const TARGET: fn(u64, u64) -> u64 = |to, _| to;
const SOURCE: fn(u64, u64) -> u64 = |_, from| from;

unsafe fn launch(
    function: usize,
    sizes: [[u32; 3]; 2],
    (shared, stream): (c_uint, usize),
    (arguments, is_early): (*mut *mut c_void, bool),
) -> c_int {
    // SAFETY: the function is from `cuModuleGetFunction`, and the arguments are those of the kernel.
    let (kernel, params) = unsafe {
        let kernel = (*(function as *const Arc<Kernel>)).clone();
        let mut params = vec![0u8; kernel.params.last().map_or(0, |&(at, bytes)| at + bytes)];
        for (i, &(at, bytes)) in kernel.params.iter().enumerate() {
            params[at..].as_mut_ptr().copy_from((*arguments.add(i)).cast(), bytes);
        }
        (kernel, params)
    };
    device().launch(kernel, sizes, (shared as usize, stream), (params, is_early))
}

/// `CUlaunchConfig`
#[repr(C)]
pub struct Config {
    blocks: [c_uint; 3],
    threads: [c_uint; 3],
    shared: c_uint,
    stream: usize,
    /// `CUlaunchAttribute`: its number, padding, and what begins with its value.
    attributes: *const [u32; 18],
    num_attributes: c_uint,
}

/// `CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`
const BEGINS_EARLY: u32 = 6;

macro_rules! driver {
    ($(fn $name:ident($($argument:ident: $kind:ty),* $(,)?) $body:block)*) => {
        $(
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name($($argument: $kind),*) -> c_int {
                trace(|| stringify!($name).into());
                #[allow(unused_unsafe)]
                // SAFETY: pointers are the caller's, and handles those that were given out here.
                unsafe { $body }
            }
        )*
    };
}

driver! {
    fn cuInit(_flags: c_uint) {
        report_at_exit();
        SUCCESS
    }
    // NVRTC asks for it.
    fn cuGetExportTable(_table: *mut usize, _id: *const c_void) { NOT_FOUND }
    fn cuDeviceGetCount(count: *mut c_int) { put(count, setting("GPU_COUNT", 1)) }
    fn cuDeviceGet(device: *mut c_int, ordinal: c_int) { put(device, ordinal) }
    fn cuDeviceGetName(name: *mut c_char, len: c_int, _device: c_int) {
        let text = c"GPU played by the processor".to_bytes_with_nul();
        name.cast::<u8>().copy_from(text.as_ptr(), text.len().min(len as usize));
        SUCCESS
    }
    fn cuDeviceTotalMem_v2(bytes: *mut usize, _device: c_int) { put(bytes, total_bytes()) }
    fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_uint, _device: c_int) {
        let capability: c_int = setting("GPU_CAPABILITY", 90);
        put(value, match attribute {
            16 => 4, // multiprocessors
            75 => capability / 10,
            76 => capability % 10,
            115 => 1, // pools of memory
            _ => 0,
        })
    }
    fn cuDevicePrimaryCtxRetain(context: *mut usize, _device: c_int) { put(context, THE_ONLY_ONE) }
    fn cuDevicePrimaryCtxRelease_v2(_device: c_int) { SUCCESS }
    fn cuCtxSetCurrent(_context: usize) { SUCCESS }
    fn cuCtxGetCurrent(context: *mut usize) { put(context, THE_ONLY_ONE) }
    fn cuCtxSynchronize() { device().health() }
    fn cuGetErrorName(error: c_int, text: *mut *const c_char) {
        let name = match error {
            INVALID_VALUE => c"CUDA_ERROR_INVALID_VALUE",
            OUT_OF_MEMORY => c"CUDA_ERROR_OUT_OF_MEMORY",
            NOT_FOUND => c"CUDA_ERROR_NOT_FOUND",
            ILLEGAL_ADDRESS => c"CUDA_ERROR_ILLEGAL_ADDRESS",
            CAPTURE_UNSUPPORTED => c"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
            CAPTURE_INVALIDATED => c"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
            _ => c"CUDA_ERROR_UNKNOWN",
        };
        put(text, name.as_ptr())
    }
    fn cuGetErrorString(_error: c_int, text: *mut *const c_char) { put(text, c"see what the GPU for tests said".as_ptr()) }

    fn cuStreamCreate(stream: *mut usize, _flags: c_uint) {
        static COUNT: AtomicUsize = AtomicUsize::new(NO_STREAM + 1);
        put(stream, COUNT.fetch_add(1, Ordering::Relaxed))
    }
    fn cuStreamDestroy_v2(_stream: usize) { SUCCESS }
    fn cuStreamWaitEvent(_stream: usize, _event: usize, _flags: c_uint) { SUCCESS }
    fn cuStreamSynchronize(stream: usize) {
        let mut device = device();
        if device.recordings.contains_key(&stream) {
            return CAPTURE_UNSUPPORTED;
        }
        device.host.await_stream(stream);
        device.health()
    }
    fn cuEventCreate(event: *mut usize, _flags: c_uint) {
        static COUNT: AtomicUsize = AtomicUsize::new(1);
        put(event, COUNT.fetch_add(1, Ordering::Relaxed))
    }
    fn cuEventRecord(event: usize, stream: usize) {
        device().host.record(event, stream);
        SUCCESS
    }
    fn cuEventSynchronize(event: usize) {
        let mut device = device();
        device.host.await_event(event);
        device.health()
    }
    fn cuEventElapsedTime(milliseconds: *mut f32, _start: usize, _end: usize) { put(milliseconds, 1.0) }
    fn cuEventElapsedTime_v2(milliseconds: *mut f32, _start: usize, _end: usize) { put(milliseconds, 1.0) }
    fn cuEventDestroy_v2(_event: usize) { SUCCESS }

    fn cuDeviceGetDefaultMemPool(pool: *mut usize, _device: c_int) { put(pool, THE_ONLY_ONE) }
    fn cuMemPoolSetAttribute(_pool: usize, _attribute: c_uint, _value: *mut c_void) { SUCCESS }
    fn cuMemPoolTrimTo(_pool: usize, _bytes: usize) { SUCCESS }
    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) {
        put(free, total_bytes() - device().state.memory.used());
        put(total, total_bytes())
    }
    fn cuMemAlloc_v2(at: *mut u64, bytes: usize) {
        match device().allocate(bytes) {
            Ok(found) => put(at, found),
            Err(error) => error,
        }
    }
    fn cuMemAllocAsync(at: *mut u64, bytes: usize, stream: usize) {
        let mut device = device();
        match device.allocate(bytes) {
            Ok(found) => {
                if let Some(graph) = device.recordings.get_mut(&stream) {
                    graph.nodes.push(Node::Allocate(found));
                }
                put(at, found)
            }
            Err(error) => error,
        }
    }
    fn cuMemFree_v2(at: u64) { if device().state.memory.free(at) { SUCCESS } else { INVALID_VALUE } }
    fn cuMemFreeAsync(at: u64, stream: usize) {
        let mut device = device();
        if let Some(graph) = device.recordings.get_mut(&stream) {
            graph.nodes.push(Node::Free(at));
            return SUCCESS;
        }
        if device.state.memory.free(at) { SUCCESS } else { INVALID_VALUE }
    }
    fn cuMemcpyHtoD_v2(to: u64, from: u64, bytes: usize) { copy(NO_STREAM, to, from, bytes, &[TARGET]) }
    fn cuMemcpyHtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: usize) { copy(stream, to, from, bytes, &[TARGET]) }
    fn cuMemcpyDtoH_v2(to: u64, from: u64, bytes: usize) { copy(NO_STREAM, to, from, bytes, &[SOURCE]) }
    fn cuMemcpyDtoHAsync_v2(to: u64, from: u64, bytes: usize, stream: usize) {
        if !device().host.has(to, bytes) {
            return copy(stream, to, from, bytes, &[SOURCE]);
        }
        let mut read = vec![0; bytes];
        let status = copy(stream, read.as_mut_ptr() as u64, from, bytes, &[SOURCE]);
        if status == SUCCESS {
            device().host.begin(stream, to, read);
        }
        status
    }
    fn cuMemHostAlloc(at: *mut u64, bytes: usize, _flags: c_uint) { put(at, device().host.allocate(bytes)) }
    fn cuMemFreeHost(at: u64) { if device().host.free(at) { SUCCESS } else { INVALID_VALUE } }
    fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: usize) { copy(stream, to, from, bytes, &[TARGET, SOURCE]) }
    fn cuMemsetD8Async(to: u64, value: u8, bytes: usize, stream: usize) {
        device().enqueue(stream, Node::Set(Arc::new(move |state: &mut State| {
            state.memory.check(to, bytes)?;
            // SAFETY: the bytes are there.
            unsafe { std::ptr::write_bytes(to as *mut u8, value, bytes) };
            Ok(())
        })))
    }

    fn cuModuleLoadData(module: *mut usize, image: *const c_char) {
        let read = ptx::Module::new(&CStr::from_ptr(image).to_string_lossy());
        let mut tables = HashMap::new();
        for table in read.tables() {
            let at = device().state.memory.allocate(table.bytes.len());
            (at as *mut u8).copy_from(table.bytes.as_ptr(), table.bytes.len());
            tables.insert(table.name, at);
        }
        put(module, keep(Loaded { module: read, tables }))
    }
    fn cuModuleUnload(module: usize) {
        drop(Box::from_raw(module as *mut Loaded));
        SUCCESS
    }
    fn cuModuleGetFunction(function: *mut usize, module: usize, name: *const c_char) {
        let loaded = &*(module as *const Loaded);
        match loaded.module.kernel(&CStr::from_ptr(name).to_string_lossy(), &loaded.tables) {
            Ok(Some(kernel)) => put(function, keep(Arc::new(kernel))),
            Ok(None) => NOT_FOUND,
            Err(why) => {
                eprintln!("gpu: {why}");
                NOT_FOUND
            }
        }
    }
    fn cuLaunchKernel(
        function: usize, x: c_uint, y: c_uint, z: c_uint, of_x: c_uint, of_y: c_uint, of_z: c_uint, shared: c_uint,
        stream: usize, arguments: *mut *mut c_void, _more: *mut *mut c_void,
    ) {
        launch(function, [[x, y, z], [of_x, of_y, of_z]], (shared, stream), (arguments, false))
    }
    fn cuLaunchKernelEx(config: *const Config, function: usize, arguments: *mut *mut c_void, _more: *mut *mut c_void) {
        let config = &*config;
        // The number of an attribute and its padding are two words, and eight bytes in all.
        let attributes = (0..config.num_attributes as usize).map(|i| *config.attributes.add(i));
        let is_early = attributes.into_iter().any(|words| words[0] == BEGINS_EARLY && words[2] != 0);
        launch(function, [config.blocks, config.threads], (config.shared, config.stream), (arguments, is_early))
    }

    fn cuStreamBeginCapture_v2(stream: usize, _mode: c_uint) {
        device().recordings.insert(stream, Graph::default());
        SUCCESS
    }
    fn cuStreamIsCapturing(stream: usize, is_recording: *mut c_uint) {
        put(is_recording, u32::from(device().recordings.contains_key(&stream)))
    }
    fn cuStreamEndCapture(stream: usize, graph: *mut usize) {
        match device().recordings.remove(&stream) {
            Some(_) if !can_record() => CAPTURE_INVALIDATED,
            Some(recorded) => put(graph, keep(recorded)),
            None => INVALID_VALUE,
        }
    }
    fn cuGraphGetNodes(graph: usize, nodes: *mut usize, count: *mut usize) {
        let all = &(*(graph as *const Graph)).nodes;
        if !nodes.is_null() {
            for (i, node) in all.iter().enumerate().take(*count) {
                nodes.add(i).write(&raw const *node as usize);
            }
        }
        put(count, all.len())
    }
    fn cuGraphNodeGetType(node: usize, kind: *mut c_uint) { put(kind, (*(node as *const Node)).kind()) }
    fn cuGraphInstantiateWithFlags(executable: *mut usize, graph: usize, _flags: u64) {
        put(executable, keep((*(graph as *const Graph)).clone()))
    }
    fn cuGraphUpload(_executable: usize, _stream: usize) { SUCCESS }
    fn cuGraphLaunch(executable: usize, _stream: usize) { device().start(&*(executable as *const Graph)) }
    fn cuGraphExecDestroy(executable: usize) {
        drop(Box::from_raw(executable as *mut Graph));
        SUCCESS
    }
    fn cuGraphDestroy(graph: usize) {
        drop(Box::from_raw(graph as *mut Graph));
        SUCCESS
    }

    fn curandCreateGenerator(generator: *mut usize, _kind: c_uint) { put(generator, THE_ONLY_ONE) }
    fn curandSetPseudoRandomGeneratorSeed(_generator: usize, _seed: u64) { SUCCESS }
    fn curandSetStream(_generator: usize, _stream: usize) { SUCCESS }
    fn curandDestroyGenerator(_generator: usize) { SUCCESS }
}
