//! Limits of decoder processes: the one place where limits are put around ffmpeg.
//!
//! Called by `ffmpeg.rs` for every child. Must never start a decoder with the server's environment (it holds keys)
//! or with a terminal. Limits are set through `prlimit` where it is installed; the wall clock and the kill on drop
//! in `ffmpeg.rs` hold without it. A jail without file system and network goes here.

use std::{
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use super::ffmpeg::find_on_path;

/// Files a decoder holds open: its libraries are mapped, so few are needed.
const MAX_OPEN_FILES: usize = 64;

/// Limits of one decoder process.
#[derive(Debug, Clone)]
pub struct Sandbox {
    prlimit: Option<PathBuf>,
    max_memory_bytes: usize,
    max_cpu_seconds: u64,
}

impl Sandbox {
    /// Limits for processes that may run `wall_clock` with `threads` threads.
    pub fn new(max_memory_bytes: usize, wall_clock: Duration, threads: usize) -> Self {
        let prlimit = find_on_path("prlimit");
        if prlimit.is_none() {
            tracing::warn!(
                "prlimit is not installed (package util-linux): decoders run without memory limits"
            );
        }
        let max_cpu_seconds = (wall_clock.as_secs() + 1) * threads as u64;
        Sandbox { prlimit, max_memory_bytes, max_cpu_seconds }
    }

    /// The same command, limited. Output pipes are the caller's to read. `on_gpu`: its driver maps more memory than any
    /// limit that would be one.
    pub fn wrap(&self, command: Command, on_gpu: bool) -> tokio::process::Command {
        let mut limited = match &self.prlimit {
            None => command,
            Some(prlimit) => {
                let mut limited = Command::new(prlimit);
                if !on_gpu {
                    limited.arg(format!("--as={}", self.max_memory_bytes));
                }
                limited
                    .arg(format!("--cpu={}", self.max_cpu_seconds))
                    .arg(format!("--nofile={MAX_OPEN_FILES}"))
                    // Frames go through the pipe: a decoder has no file to write.
                    .args(["--fsize=0", "--core=0", "--"])
                    .arg(command.get_program())
                    .args(command.get_args());
                limited
            }
        };
        limited.env_clear();
        for name in ["PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES"] {
            limited.envs(std::env::var_os(name).map(|value| (name, value)));
        }
        limited.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut limited = tokio::process::Command::from(limited);
        limited.kill_on_drop(true);
        limited
    }
}

/// When memory runs out, the kernel shall take the decoder `process` and not the server.
pub fn kill_first(process: u32) {
    // Where /proc does not allow it, the kernel's own choice stays.
    let _ = std::fs::write(format!("/proc/{process}/oom_score_adj"), "1000");
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_decoder_is_killed_before_the_server_when_memory_runs_out() {
        let sandbox = Sandbox::new(1 << 30, Duration::from_secs(5), 1);
        let mut command = Command::new("sleep");
        command.arg("5");
        let child = sandbox.wrap(command, false).spawn().unwrap();
        kill_first(child.id().unwrap());
        let score = std::fs::read_to_string(format!("/proc/{}/oom_score_adj", child.id().unwrap()));
        assert_eq!(score.unwrap().trim(), "1000");
    }
}
