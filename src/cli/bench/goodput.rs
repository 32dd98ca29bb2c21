//! `--goodput ttft:500ms,tpot:50ms,e2e:10s`: which requests were served as fast as they had to be.
//!
//! Called by [`super`]; pure. A request that failed never counts as good: only times of successful ones come here.

use std::{str::FromStr, time::Duration};

/// Longest time of each kind; `None` leaves that kind free.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Goodput {
    first_token: Option<Duration>,
    output_token: Option<Duration>,
    end_to_end: Option<Duration>,
}

impl Goodput {
    /// Whether one request kept every limit. `output_token` is `None` for a reply of one token, which has no such time.
    pub(super) fn is_met(
        &self,
        first_token: Duration,
        output_token: Option<Duration>,
        end_to_end: Duration,
    ) -> bool {
        let within = |time: Option<Duration>, limit| !matches!((time, limit), (Some(time), Some(limit)) if time > limit);
        within(Some(first_token), self.first_token)
            && within(output_token, self.output_token)
            && within(Some(end_to_end), self.end_to_end)
    }
}

impl FromStr for Goodput {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut goodput = Goodput::default();
        for part in text.split(',') {
            let (name, time) = part.split_once(':').ok_or(format!("{part:?}: write it like ttft:500ms"))?;
            let limit = match name.trim() {
                "ttft" => &mut goodput.first_token,
                "tpot" => &mut goodput.output_token,
                "e2e" => &mut goodput.end_to_end,
                other => return Err(format!("{other:?} is no limit: there are ttft, tpot and e2e")),
            };
            if limit.replace(duration(time)?).is_some() {
                return Err(format!("{} is given twice: give it once", name.trim()));
            }
        }
        Ok(goodput)
    }
}

/// A number above zero with its unit, `ms` or `s`.
fn duration(text: &str) -> Result<Duration, String> {
    let text = text.trim();
    let wrong = || format!("{text:?} is no time: write it like 500ms or 2.5s");
    let (number, unit) = match text.strip_suffix("ms") {
        Some(number) => (number, 1e-3),
        None => (text.strip_suffix('s').ok_or_else(wrong)?, 1.0),
    };
    let seconds = number.parse::<f64>().map_err(|_| wrong())? * unit;
    match Duration::try_from_secs_f64(seconds) {
        Ok(time) if !time.is_zero() => Ok(time),
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    #[test]
    fn limits_are_named_and_have_units() {
        let goodput: Goodput = "ttft:500ms, tpot:50ms,e2e:2.5s".parse().unwrap();
        let (first_token, output_token, end_to_end) = (Some(MS(500)), Some(MS(50)), Some(MS(2500)));
        assert_eq!(goodput, Goodput { first_token, output_token, end_to_end });
    }

    #[test]
    fn every_limit_has_to_be_kept_and_the_limit_itself_is_good() {
        let goodput: Goodput = "ttft:500ms,tpot:50ms".parse().unwrap();
        assert!(goodput.is_met(MS(500), Some(MS(50)), MS(1_000_000)));
        assert!(!goodput.is_met(MS(501), Some(MS(50)), MS(600)));
        assert!(!goodput.is_met(MS(500), Some(MS(51)), MS(600)));
        assert!(goodput.is_met(MS(500), None, MS(500)), "one token has no time per output token");
        assert!(!"e2e:1s".parse::<Goodput>().unwrap().is_met(MS(1), None, MS(1001)));
    }

    #[test]
    fn what_is_no_limit_is_refused() {
        let texts = [
            "",
            "ttft",
            "ttft:5",
            "ttft:0s",
            "ttft:-1s",
            "itl:5ms",
            "ttft:nans",
            "ttft:infs",
            "e2e:1e30s",
            "ttft:1s,ttft:2s",
            "e2e:1s,",
        ];
        for text in texts {
            assert!(text.parse::<Goodput>().is_err(), "{text}");
        }
    }
}
