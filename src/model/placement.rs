//! Where a model runs: `--device`, and what becomes of it on this machine.
//!
//! Used by `cli` when a model is loaded and by `doctor`. Asks the driver; computes nothing.

use std::str::FromStr;

use candle_core::{DType, Device};
use thiserror::Error;

use super::Result as ModelResult;

/// What `--device` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Placement {
    /// The first GPU where this binary can use one, else the CPU.
    #[default]
    Auto,
    /// Our own kernels, on all cores.
    Cpu,
    /// The GPU of this number.
    Cuda(usize),
}

/// Why a device cannot be used: one sentence that says what to do.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PlacementError {
    #[error("there is no device {0:?}: give auto, cpu or cuda:N")]
    Unknown(String),
    #[error("this binary was built without CUDA: give --device cpu, or build it with `make build-cuda`")]
    NotBuilt,
    #[error("cuda:{ordinal} cannot be used ({reason}): see what nvidia-smi lists, or give --device cpu")]
    Unusable { ordinal: usize, reason: String },
}

impl FromStr for Placement {
    type Err = PlacementError;

    fn from_str(text: &str) -> Result<Self, PlacementError> {
        let unknown = || PlacementError::Unknown(text.into());
        match text {
            "auto" => Ok(Placement::Auto),
            "cpu" => Ok(Placement::Cpu),
            "cuda" => Ok(Placement::Cuda(0)),
            _ => {
                let ordinal = text.strip_prefix("cuda:").ok_or_else(unknown)?;
                ordinal.parse().map(Placement::Cuda).map_err(|_| unknown())
            }
        }
    }
}

impl std::fmt::Display for Placement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Placement::Auto => f.write_str("auto"),
            Placement::Cpu => f.write_str("cpu"),
            Placement::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl Placement {
    /// Decides for "auto"; anything else stays what it is.
    pub fn resolved(self) -> Placement {
        match self {
            Placement::Auto if num_gpus() > 0 => Placement::Cuda(0),
            Placement::Auto => Placement::Cpu,
            other => other,
        }
    }

    /// Opens the device; none is the CPU with our own kernels.
    ///
    /// # Errors
    /// When this binary or this machine has no such GPU.
    pub fn open(self) -> Result<Option<Device>, PlacementError> {
        match self.resolved() {
            Placement::Cuda(ordinal) => open_gpu(ordinal).map(Some),
            _ => Ok(None),
        }
    }
}

/// GPUs this binary can use.
#[cfg(feature = "cuda")]
fn num_gpus() -> usize {
    super::device::cuda::num_devices()
}

/// None: this binary was built without them.
#[cfg(not(feature = "cuda"))]
fn num_gpus() -> usize {
    0
}

#[cfg(feature = "cuda")]
fn open_gpu(ordinal: usize) -> Result<Device, PlacementError> {
    // Asked first: opening a device without a driver may panic.
    let count = num_gpus();
    if ordinal >= count {
        let reason = if count == 0 { "no GPU or no driver".into() } else { format!("there are {count}") };
        return Err(PlacementError::Unusable { ordinal, reason });
    }
    // One line of it: what follows is a backtrace.
    let first_line =
        |error: super::ModelError| error.to_string().lines().next().unwrap_or_default().to_owned();
    super::device::cuda::open(ordinal)
        .map_err(|error| PlacementError::Unusable { ordinal, reason: first_line(error) })
}

#[cfg(not(feature = "cuda"))]
fn open_gpu(_: usize) -> Result<Device, PlacementError> {
    Err(PlacementError::NotBuilt)
}

/// What a device computes in when nobody says.
///
/// # Errors
/// When the driver does not answer.
pub fn native_dtype(device: &Device) -> ModelResult<DType> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => super::device::cuda::native_dtype(device),
        _ => Ok(DType::F32),
    }
}

/// Name of a device, for people.
///
/// # Errors
/// When the driver does not answer.
pub fn name(device: &Device) -> ModelResult<String> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => super::device::cuda::name(device),
        _ => Ok("cpu".into()),
    }
}

/// Bytes for the KV cache on a device that holds its weights already: what is left of `utilization` of its memory. None
/// where the device does not tell.
///
/// # Errors
/// When the driver does not answer.
pub fn cache_bytes(device: &Device, utilization: f64) -> ModelResult<Option<usize>> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => {
            let (free, total) = super::device::cuda::memory(device)?;
            Ok(Some(budget(free, total, utilization)))
        }
        _ => {
            let _ = utilization;
            Ok(None)
        }
    }
}

/// The rest of memory is for a step's own tensors.
#[cfg(any(feature = "cuda", test))]
fn budget(free: usize, total: usize, utilization: f64) -> usize {
    let used = total - free;
    ((total as f64 * utilization) as usize).saturating_sub(used)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_and_written() {
        for (text, placement) in [
            ("auto", Placement::Auto),
            ("cpu", Placement::Cpu),
            ("cuda:0", Placement::Cuda(0)),
            ("cuda:3", Placement::Cuda(3)),
        ] {
            assert_eq!(text.parse(), Ok(placement));
            assert_eq!(placement.to_string(), text);
        }
        assert_eq!("cuda".parse(), Ok(Placement::Cuda(0)));
        for text in ["gpu", "cuda:", "cuda:x", "cuda:-1", ""] {
            let error = text.parse::<Placement>().unwrap_err().to_string();
            assert!(error.contains("give auto, cpu or cuda:N"), "{error}");
        }
    }

    #[test]
    fn the_cpu_is_no_device_and_a_gpu_that_is_not_there_is_one_sentence() {
        assert!(Placement::Cpu.open().unwrap().is_none());
        let error = Placement::Cuda(99).open().unwrap_err().to_string();
        assert!(error.contains("--device cpu") && !error.contains('\n'), "{error}");
    }

    #[test]
    fn the_cache_gets_what_the_weights_leave_of_the_budget() {
        assert_eq!(budget(70, 100, 0.9), 60);
        assert_eq!(budget(5, 100, 0.9), 0);
    }
}
