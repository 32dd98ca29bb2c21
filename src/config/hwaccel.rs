//! The setting for hardware video decoding, and its flag syntax.
//!
//! Read by `media`. Must never probe for a device.

use std::{fmt, str::FromStr};

/// Help for the video decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HwAccel {
    #[default]
    None,
    /// NVDEC of the GPU with this number.
    Cuda(usize),
}

impl fmt::Display for HwAccel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HwAccel::None => f.write_str("none"),
            HwAccel::Cuda(gpu) => write!(f, "cuda:{gpu}"),
        }
    }
}

impl FromStr for HwAccel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let gpu = match text {
            "none" => return Ok(HwAccel::None),
            "cuda" => Some(0),
            _ => text.strip_prefix("cuda:").and_then(|gpu| gpu.parse().ok()),
        };
        gpu.map(HwAccel::Cuda).ok_or_else(|| "give none, cuda or cuda:N".into())
    }
}
