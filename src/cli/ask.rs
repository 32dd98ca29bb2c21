//! `tinyllava ask`: one question about one video, the thinking and the answer printed as they come.
//!
//! A client like any other: it talks to a server over HTTP, also when that server runs in the same process.

use std::{
    io::{IsTerminal, Write},
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use url::Url;

use super::chat_client::{ChatChunk, ChatClient, ChatStream, Usage};

/// What to ask, and how.
#[derive(Debug, Clone, clap::Args)]
pub struct AskArgs {
    /// The video file.
    pub video: PathBuf,
    /// The question; put options on lines of their own ("A. …").
    pub question: String,
    /// A running server to ask; without it the model runs in this process.
    #[arg(long, value_name = "URL")]
    pub server: Option<Url>,
    /// Replaces the template's system text.
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Longest reply, tokens.
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<usize>,
    /// 0 always takes the likeliest token.
    #[arg(long, value_name = "T")]
    pub temperature: Option<f32>,
    /// Frames to look at.
    #[arg(long, value_name = "N")]
    pub num_frames: Option<usize>,
    /// The same seed gives the same reply.
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Print one JSON object at the end, and nothing else.
    #[arg(long)]
    pub json: bool,
    /// Whether to dim the thinking and set the answer in bold type.
    #[arg(long, value_enum, default_value = "auto")]
    pub color: ColorChoice,
    /// Key of the server.
    #[arg(long, value_name = "KEY", env = "TINYLLAVA_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// Longest time for the whole reply, seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub timeout_s: u64,
}

/// When to write terminal colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum ColorChoice {
    /// On a terminal, unless NO_COLOR is set.
    Auto,
    Always,
    Never,
}

impl ColorChoice {
    fn enabled(self) -> bool {
        match self {
            ColorChoice::Always => true,
            ColorChoice::Never => false,
            ColorChoice::Auto => {
                std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
            }
        }
    }
}

/// Asks the server at `server` and prints the reply to standard output.
///
/// # Errors
/// One sentence for everything that can go wrong, from a missing file to a reply that broke off.
pub async fn ask(server: &Url, args: &AskArgs) -> anyhow::Result<()> {
    ask_into(server, args, &mut std::io::stdout(), args.color.enabled()).await
}

/// [`ask`], printing to `out`.
pub async fn ask_into(server: &Url, args: &AskArgs, out: &mut impl Write, color: bool) -> anyhow::Result<()> {
    let file = reqwest::multipart::Part::file(&args.video)
        .await
        .with_context(|| format!("cannot open the video {}", args.video.display()))?;
    let client = ChatClient::new(server, args.api_key.clone(), Duration::from_secs(args.timeout_s))?;
    let request = request(args, &client.first_model().await?);
    let request = reqwest::multipart::Part::text(request.to_string()).mime_str("application/json")?;
    let form = reqwest::multipart::Form::new().part("request", request).part("video", file);
    let spinner = Spinner::start(format!("watching {}", args.video.display()));
    let started = Instant::now();
    let stream = client.post_form(form).await?;
    let mut printer = Printer { out, color, quiet: args.json, style: Style::None };
    let reply = read_reply(stream, started, &spinner, &mut printer).await?;
    printer.set_style(Style::None)?;
    if args.json {
        writeln!(printer.out, "{}", reply.to_json())?;
    } else {
        writeln!(printer.out, "\n\n{}", reply.summary())?;
    }
    printer.out.flush()?;
    Ok(())
}

fn request(args: &AskArgs, model: &str) -> Value {
    let mut messages = Vec::new();
    if let Some(system) = &args.system {
        messages.push(json!({"role": "system", "content": system}));
    }
    messages.push(json!({"role": "user", "content": [{"type": "text", "text": args.question}]}));
    let mut request = json!({
        "model": model,
        "messages": messages,
        "stream": true,
        "stream_options": {"include_usage": true},
    });
    let fields = [
        ("max_tokens", args.max_tokens.map(Value::from)),
        ("temperature", args.temperature.map(Value::from)),
        ("seed", args.seed.map(Value::from)),
        ("media_io_kwargs", args.num_frames.map(|n| json!({"video": {"num_frames": n}}))),
    ];
    for (name, value) in fields {
        if let Some(value) = value {
            request[name] = value;
        }
    }
    request
}

/// A whole reply with its times.
#[derive(Debug, Default)]
struct AskReply {
    think: String,
    content: String,
    finish_reason: Option<String>,
    usage: Usage,
    video: Option<Value>,
    first_token: Option<Duration>,
    total: Duration,
}

impl AskReply {
    fn add(&mut self, chunk: ChatChunk, at: Duration) {
        if chunk.has_text() {
            self.first_token.get_or_insert(at);
        }
        self.think.push_str(&chunk.think);
        self.content.push_str(&chunk.content);
        self.finish_reason = chunk.finish_reason.or(self.finish_reason.take());
        self.video = chunk.video.or(self.video.take());
        self.usage = chunk.usage.unwrap_or(self.usage);
        self.total = at;
    }

    /// Tokens a second once the first one is there.
    fn tokens_per_second(&self) -> Option<f64> {
        let seconds = (self.total - self.first_token?).as_secs_f64();
        (self.usage.completion_tokens > 1 && seconds > 0.0)
            .then(|| (self.usage.completion_tokens - 1) as f64 / seconds)
    }

    fn summary(&self) -> String {
        let Usage { completion_tokens, reasoning_tokens, .. } = self.usage;
        let mut summary = format!("{completion_tokens} tokens, {reasoning_tokens} of them thinking");
        if let Some(first) = self.first_token {
            summary += &format!(" · first token after {:.2} s", first.as_secs_f64());
        }
        if let Some(speed) = self.tokens_per_second() {
            summary += &format!(" · {speed:.1} tokens/s");
        }
        if self.finish_reason.as_deref() == Some("length") {
            summary += " · cut off at the token limit";
        }
        summary
    }

    fn to_json(&self) -> Value {
        json!({
            "reasoning": self.think,
            "answer": self.content,
            "finish_reason": self.finish_reason,
            "usage": self.usage,
            "video": self.video,
            "time_to_first_token_s": self.first_token.map(|time| time.as_secs_f64()),
            "total_s": self.total.as_secs_f64(),
            "tokens_per_second": self.tokens_per_second(),
        })
    }
}

async fn read_reply(
    mut stream: ChatStream,
    started: Instant,
    spinner: &Spinner,
    printer: &mut Printer<'_, impl Write>,
) -> anyhow::Result<AskReply> {
    let mut reply = AskReply::default();
    while let Some(chunk) = stream.next().await? {
        if chunk.has_text() {
            spinner.stop();
            printer.print(Style::Think, &chunk.think)?;
            printer.print(Style::Answer, &chunk.content)?;
        }
        reply.add(chunk, started.elapsed());
    }
    if reply.finish_reason.is_none() {
        bail!("the server ended the reply without saying why");
    }
    Ok(reply)
}

/// Turns on standard error until the first token comes; invisible when that is no terminal.
struct Spinner(ProgressBar);

impl Spinner {
    fn start(message: String) -> Self {
        let style = ProgressStyle::with_template("{spinner} {msg} ({elapsed})");
        let bar = ProgressBar::new_spinner()
            .with_style(style.expect("the spinner's template is valid: this is a bug"))
            .with_message(message);
        bar.enable_steady_tick(Duration::from_millis(100));
        Spinner(bar)
    }

    fn stop(&self) {
        self.0.finish_and_clear();
    }
}

impl Drop for Spinner {
    fn drop(&mut self) {
        self.stop();
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Style {
    None,
    Think,
    Answer,
}

/// Writes text in the style of its segment.
struct Printer<'a, W: Write> {
    out: &'a mut W,
    color: bool,
    /// Say nothing until the end.
    quiet: bool,
    style: Style,
}

/// A reply that breaks off must not leave the terminal dim.
impl<W: Write> Drop for Printer<'_, W> {
    fn drop(&mut self) {
        // Nobody is left to tell when this fails.
        let _ = self.set_style(Style::None);
    }
}

impl<W: Write> Printer<'_, W> {
    fn print(&mut self, style: Style, text: &str) -> std::io::Result<()> {
        if text.is_empty() || self.quiet {
            return Ok(());
        }
        let between = self.style != Style::None && self.style != style;
        self.set_style(style)?;
        if between {
            self.out.write_all(b"\n\n")?;
        }
        // A model must not be able to steer the terminal.
        let printable: String =
            text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect();
        self.out.write_all(printable.as_bytes())?;
        self.out.flush()
    }

    fn set_style(&mut self, style: Style) -> std::io::Result<()> {
        if self.color && self.style != style {
            let code = match style {
                Style::None => "\x1b[0m",
                Style::Think => "\x1b[0m\x1b[2m",
                Style::Answer => "\x1b[0m\x1b[1m",
            };
            self.out.write_all(code.as_bytes())?;
        }
        self.style = style;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        ask: AskArgs,
    }

    fn args(options: &[&str]) -> AskArgs {
        Cli::parse_from(["ask", "clip.mp4", "What?"].iter().chain(options)).ask
    }

    #[test]
    fn only_given_options_are_sent() {
        let request_of = |options: &[&str]| request(&args(options), "m");
        let plain = request_of(&[]);
        assert_eq!(plain["messages"][0]["content"][0]["text"], "What?");
        assert_eq!(plain.as_object().unwrap().len(), 4);
        let full = request_of(&[
            "--system",
            "S",
            "--max-tokens",
            "5",
            "--temperature",
            "0",
            "--seed",
            "7",
            "--num-frames",
            "4",
        ]);
        assert_eq!(full["messages"][0], json!({"role": "system", "content": "S"}));
        assert_eq!((&full["max_tokens"], &full["seed"]), (&json!(5), &json!(7)));
        assert_eq!(full["media_io_kwargs"]["video"]["num_frames"], 4);
        assert_eq!(full["temperature"].as_f64(), Some(0.0));
    }

    #[test]
    fn thinking_is_dim_and_the_answer_bold() {
        let mut out = Vec::new();
        let mut printer = Printer { out: &mut out, color: true, quiet: false, style: Style::None };
        for (style, text) in
            [(Style::Think, "a"), (Style::Think, "b"), (Style::Answer, "C"), (Style::None, "")]
        {
            printer.print(style, text).unwrap();
        }
        drop(printer);
        assert_eq!(String::from_utf8(out).unwrap(), "\x1b[0m\x1b[2mab\x1b[0m\x1b[1m\n\nC\x1b[0m");
    }

    #[test]
    fn without_colour_the_text_is_bare_and_cannot_steer_the_terminal() {
        let mut out = Vec::new();
        let mut printer = Printer { out: &mut out, color: false, quiet: false, style: Style::None };
        printer.print(Style::Answer, "\x1b[2Ja\tb\n\u{9b}c\r").unwrap();
        drop(printer);
        assert_eq!(String::from_utf8(out).unwrap(), "[2Ja\tb\nc");
    }

    #[test]
    fn the_summary_tells_tokens_and_times() {
        let mut reply = AskReply::default();
        reply.add(ChatChunk { think: "a".into(), ..Default::default() }, Duration::from_millis(500));
        let usage = Usage { prompt_tokens: 9, completion_tokens: 11, reasoning_tokens: 4 };
        let last =
            ChatChunk { usage: Some(usage), finish_reason: Some("length".into()), ..Default::default() };
        reply.add(last, Duration::from_millis(2500));
        let expected = "11 tokens, 4 of them thinking · first token after 0.50 s · 5.0 tokens/s · cut off at the token limit";
        assert_eq!(reply.summary(), expected);
        assert_eq!(reply.to_json()["usage"]["reasoning_tokens"], 4);
    }
}
