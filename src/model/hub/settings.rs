//! Where the hub is and where its files are kept, from the variables its other tools read.
//!
//! Used by [`super`] alone.

use std::path::PathBuf;

use super::HubError;

/// Where the hub is and where its files are kept.
#[derive(Debug, Clone)]
pub struct HubConfig {
    /// Without a slash at the end.
    pub endpoint: String,
    pub token: Option<String>,
    /// Holds `models--org--name` folders.
    pub cache_dir: PathBuf,
    /// Never use the network.
    pub offline: bool,
}

impl HubConfig {
    /// From `HF_ENDPOINT`, `HF_TOKEN` (or the token file of the hub's own tools), `HF_HUB_CACHE` or `HF_HOME`, and
    /// `HF_HUB_OFFLINE`, as `variable` gives them.
    pub fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Self, HubError> {
        let set = |name: &str| variable(name).map(|v| v.trim().to_owned()).filter(|value| !value.is_empty());
        let cache_home = || {
            let base = set("XDG_CACHE_HOME").map(PathBuf::from);
            base.or_else(|| Some(PathBuf::from(set("HOME")?).join(".cache")))
                .map(|dir| dir.join("huggingface"))
        };
        let home = set("HF_HOME").map(PathBuf::from).or_else(cache_home);
        let cache_dir = set("HF_HUB_CACHE").map(PathBuf::from).or_else(|| Some(home.as_ref()?.join("hub")));
        let token_file =
            set("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| Some(home.as_ref()?.join("token")));
        let stored_token = || {
            let text = std::fs::read_to_string(token_file?).ok()?;
            Some(text.trim().to_owned()).filter(|token| !token.is_empty())
        };
        Ok(HubConfig {
            endpoint: set("HF_ENDPOINT")
                .map_or_else(|| "https://huggingface.co".into(), |url| url.trim_end_matches('/').into()),
            token: set("HF_TOKEN").or_else(stored_token),
            cache_dir: cache_dir.ok_or(HubError::NoCache)?,
            offline: set("HF_HUB_OFFLINE").is_some_and(|value| value != "0"),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn config(variables: &[(&str, &str)]) -> HubConfig {
        let map: HashMap<_, _> = variables.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        HubConfig::from_variables(|name| map.get(name).cloned()).unwrap()
    }

    #[test]
    fn the_environment_says_where_hub_and_cache_are() {
        let plain = config(&[("HOME", "/home/me")]);
        assert_eq!(plain.endpoint, "https://huggingface.co");
        assert_eq!(plain.cache_dir, PathBuf::from("/home/me/.cache/huggingface/hub"));
        assert_eq!((plain.token, plain.offline), (None, false));
        let set = config(&[
            ("HF_HOME", "/data/hf"),
            ("HF_ENDPOINT", "http://mirror:80/"),
            ("HF_TOKEN", " secret\n"),
            ("HF_HUB_OFFLINE", "1"),
        ]);
        assert_eq!(
            (set.endpoint.as_str(), set.cache_dir),
            ("http://mirror:80", PathBuf::from("/data/hf/hub"))
        );
        assert_eq!((set.token.as_deref(), set.offline), (Some("secret"), true));
        assert!(matches!(HubConfig::from_variables(|_| None), Err(HubError::NoCache)));
    }

    #[test]
    fn the_token_file_of_other_tools_is_read() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("token"), "stored\n").unwrap();
        let config = config(&[("HF_HOME", dir.path().to_str().unwrap())]);
        assert_eq!(config.token.as_deref(), Some("stored"));
    }
}
