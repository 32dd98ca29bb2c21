//! `tinyllava doctor`: whether this machine can serve what `serve` with the same flags would, and what to fix.
//!
//! Called by people before a first start, and by init containers. Takes the flags of `serve`, loads no weights, serves
//! nothing and leaves nothing behind. Each check is one `Finding`; a problem means that `serve` would fail.

mod clips;
mod machine;
mod memory;
mod model;
mod places;

use anyhow::bail;
use clap::Args;
use serde_json::json;

use super::serve::ServeArgs;

/// The flags of `serve`, and how to print.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    #[command(flatten)]
    serve: ServeArgs,
    /// Print one JSON object instead of lines.
    #[arg(long)]
    json: bool,
}

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    Ok,
    /// The server starts, but some requests will fail or be slow.
    Warning,
    /// The server would not start.
    Problem,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Level::Ok => "ok",
            Level::Warning => "warning",
            Level::Problem => "problem",
        }
    }
}

/// What one check found.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Finding {
    check: &'static str,
    level: Level,
    found: String,
    /// What to do about it.
    fix: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Finding { check, level: Level::Ok, found: found.into(), fix: None }
    }

    fn warning(check: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Finding { check, level: Level::Warning, found: found.into(), fix: Some(fix.into()) }
    }

    fn problem(check: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Finding { check, level: Level::Problem, found: found.into(), fix: Some(fix.into()) }
    }
}

/// Checks everything and prints it.
///
/// # Errors
/// When there is a problem.
pub async fn doctor(args: DoctorArgs) -> anyhow::Result<()> {
    let config = args.serve.config();
    let mut findings = machine::check(&args.serve, &config);
    findings.extend(clips::check(&args.serve.model, &config.media).await);
    findings.extend(model::check(&args.serve.models()?, &config));
    findings.extend(places::check(&args.serve, &config));
    print(&findings, args.json);
    match findings.iter().filter(|finding| finding.level == Level::Problem).count() {
        0 => Ok(()),
        1 => bail!("1 problem: the server would not start"),
        problems => bail!("{problems} problems: the server would not start"),
    }
}

#[expect(clippy::print_stdout, reason = "the command's output")]
fn print(findings: &[Finding], as_json: bool) {
    let worst = findings.iter().map(|finding| finding.level).max().unwrap_or(Level::Ok);
    if as_json {
        let checks: Vec<_> = findings
            .iter()
            .map(|Finding { check, level, found, fix }| {
                json!({"check": check, "level": level.name(), "found": found, "fix": fix})
            })
            .collect();
        println!("{:#}", json!({"status": worst.name(), "checks": checks}));
        return;
    }
    for Finding { check, level, found, fix } in findings {
        let fix = fix.as_ref().map(|fix| format!("; {fix}")).unwrap_or_default();
        println!("{:<8} {check:<14} {found}{fix}", level.name());
    }
}
