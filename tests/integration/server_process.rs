//! The binary as a server of its own, for tests.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    sync::{Mutex, mpsc},
};

/// A server of its own, and what it logs.
pub struct Server {
    pub process: std::process::Child,
    log: Mutex<mpsc::Receiver<String>>,
    pub url: String,
    /// What it logged until it was ready.
    pub before: Vec<String>,
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
        // Read on at any time: a server whose log is full would stop.
        let (lines, log) = mpsc::channel();
        let mut stderr = BufReader::new(process.stderr.take().unwrap()).lines().map(Result::unwrap);
        std::thread::spawn(move || stderr.try_for_each(|line| lines.send(line)));
        let mut before = Vec::new();
        let ready = log.iter().find(|line| {
            before.push(line.clone());
            line.contains("ready: ")
        });
        let ready = ready.unwrap_or_else(|| panic!("the server did not start: {before:#?}"));
        let url = ready.split("ready: ").nth(1).unwrap().split('"').next().unwrap().to_string();
        Server { process, log: Mutex::new(log), url, before }
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
        let rest = self.log.get_mut().unwrap().iter().collect();
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
        let found = self.log.get_mut().unwrap().iter().any(|line| line.contains(text));
        assert!(found, "\"{text}\" was never logged");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
    }
}
