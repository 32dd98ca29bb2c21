//! Processor, cores, GPU, open files, clock.
//!
//! Called by `doctor`. Reads `/proc` and `/dev`; what this system does not tell is left out, never guessed.

use std::{
    fs,
    path::Path,
    thread,
    time::{SystemTime, UNIX_EPOCH},
};

use super::Finding;
use crate::{cli::serve::ServeArgs, config::Config};

/// File descriptors besides one a connection: decoders' pipes, downloads, libraries.
const OTHER_OPEN_FILES: u64 = 256;
/// A clock before 2025 is not set: certificates of the hub and of video hosts would seem not yet valid.
const EARLIEST_CLOCK_SECONDS: u64 = 1_735_689_600;

pub fn check(args: &ServeArgs, config: &Config) -> Vec<Finding> {
    let mut findings = vec![processor(), cores(args.model.threads)];
    findings.push(gpu(Path::new("/")));
    let limits = fs::read_to_string("/proc/self/limits").unwrap_or_default();
    findings.extend(open_files(&limits, config.max_connections as u64));
    findings.push(clock());
    findings
}

#[cfg(target_arch = "x86_64")]
fn processor() -> Finding {
    let features = [
        ("AVX2", is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")),
        ("AVX-512", is_x86_feature_detected!("avx512f")),
        ("AVX-512 VNNI", is_x86_feature_detected!("avx512vnni")),
        ("AVX-512 BF16", is_x86_feature_detected!("avx512bf16")),
        ("AMX", crate::model::machine::has_tile_unit()),
    ];
    let present: Vec<&str> = features.iter().filter(|(_, has)| *has).map(|(name, _)| *name).collect();
    if !features[0].1 {
        let fix = "the model runs several times slower; use a processor (or a virtual machine type) with AVX2 and FMA";
        return Finding::warning("processor", "no AVX2", fix);
    }
    Finding::ok("processor", present.join(", "))
}

#[cfg(not(target_arch = "x86_64"))]
fn processor() -> Finding {
    Finding::ok("processor", std::env::consts::ARCH)
}

/// What may be used (affinity and the quota of the cgroup counted in) against what the machine has.
fn cores(threads: Option<usize>) -> Finding {
    let usable = thread::available_parallelism().map_or(1, usize::from);
    let all = fs::read_to_string("/proc/cpuinfo")
        .map_or(usable, |text| text.lines().filter(|line| line.starts_with("processor")).count().max(1));
    let found = format!("{usable} of {all} may be used, the model takes {}", threads.unwrap_or(usable));
    if threads.is_some_and(|threads| threads > usable) {
        return Finding::warning(
            "cores",
            found,
            "more threads than cores wait for one another: lower --threads",
        );
    }
    Finding::ok("cores", found)
}

fn gpu(root: &Path) -> Finding {
    if !root.join("dev/nvidia0").exists() && !root.join("proc/driver/nvidia/version").exists() {
        return Finding::ok("gpu", "none; this build computes on the processor");
    }
    let fix = "nothing is wrong, but the GPU stays idle";
    Finding::warning("gpu", "an NVIDIA GPU is here, and this build computes on the processor", fix)
}

/// From the text of `/proc/self/limits`.
fn open_files(limits: &str, max_connections: u64) -> Option<Finding> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    let soft = line.split_whitespace().next()?;
    let needed = max_connections + OTHER_OPEN_FILES;
    Some(match soft.parse::<u64>() {
        Ok(limit) if limit < needed => Finding::warning(
            "open files",
            format!("at most {limit}, fewer than {max_connections} connections need"),
            format!("raise it to {needed} (ulimit -n, LimitNOFILE=)"),
        ),
        _ => Finding::ok("open files", format!("at most {soft}")),
    })
}

fn clock() -> Finding {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    if seconds < EARLIEST_CLOCK_SECONDS {
        return Finding::warning("clock", "it is years behind", "set it: certificates seem not yet valid");
    }
    Finding::ok("clock", "plausible")
}

#[cfg(test)]
mod tests {
    use super::{super::Level, *};

    #[test]
    fn too_few_open_files_are_a_warning_and_no_limit_is_none() {
        let limits = |soft: &str| format!("Limit  Soft\nMax open files            {soft}   4096   files\n");
        assert_eq!(open_files(&limits("1024"), 1024).unwrap().level, Level::Warning);
        for soft in ["1280", "unlimited"] {
            assert_eq!(open_files(&limits(soft), 1024).unwrap().level, Level::Ok);
        }
        assert_eq!(open_files("", 1024), None);
    }

    #[test]
    fn more_threads_than_cores_are_a_warning() {
        assert_eq!(cores(Some(1)).level, Level::Ok);
        assert_eq!(cores(Some(100_000)).level, Level::Warning);
    }

    #[test]
    fn a_gpu_that_stays_idle_is_told() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(gpu(root.path()).level, Level::Ok);
        fs::create_dir(root.path().join("dev")).unwrap();
        fs::write(root.path().join("dev/nvidia0"), "").unwrap();
        assert_eq!(gpu(root.path()).level, Level::Warning);
    }
}
