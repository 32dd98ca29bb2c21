//! The binary as a server of its own, for tests.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
};

/// A server of its own, and what it logs.
pub struct Server {
    pub process: std::process::Child,
    log: std::io::Lines<BufReader<std::process::ChildStderr>>,
    pub url: String,
}

impl Server {
    pub fn start(more: &[&str]) -> Self {
        Server::start_in(&[], more)
    }

    /// With more environment.
    pub fn start_in(environment: &[(&str, &str)], more: &[&str]) -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_tinyllava"))
            .args(["serve", "--port", "0"])
            .args(more)
            .envs(environment.iter().copied())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut log = BufReader::new(process.stderr.take().unwrap()).lines();
        let mut before = Vec::new();
        let ready = log.by_ref().map(Result::unwrap).find(|line| {
            before.push(line.clone());
            line.contains("ready: ")
        });
        let ready = ready.unwrap_or_else(|| panic!("the server did not start: {before:#?}"));
        let url = ready.split("ready: ").nth(1).unwrap().split('"').next().unwrap().to_string();
        Server { process, log, url }
    }

    /// Posts a chat request with curl; its output is the response body.
    pub fn post(&self, request_id: &str, request: &str) -> std::process::Child {
        Command::new("curl")
            .args([
                "-sSN",
                "-H",
                "content-type: application/json",
                "-H",
                &format!("x-request-id: {request_id}"),
            ])
            .args(["-d", request, &format!("{}/v1/chat/completions", self.url)])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// Asks it to stop; gives the rest of its log once it has, which must be with success.
    pub fn stop(mut self) -> Vec<String> {
        self.terminate();
        let rest = self.log.by_ref().map(Result::unwrap).collect();
        assert!(self.process.wait().unwrap().success());
        rest
    }

    pub fn terminate(&self) {
        self.signal("-TERM");
    }

    pub fn signal(&self, signal: &str) {
        let told = Command::new("kill").args([signal, &self.process.id().to_string()]).status().unwrap();
        assert!(told.success());
    }

    /// Waits for a line with `text` in it.
    pub fn until_logged(&mut self, text: &str) {
        let found = self.log.by_ref().map(Result::unwrap).any(|line| line.contains(text));
        assert!(found, "\"{text}\" was never logged");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
    }
}
