//! The published checkpoints of the family, and what their `config.json` does not say: how frames were sampled and
//! whether the model was trained to think aloud.
//!
//! Used by `cli/start.rs`. Names only: nothing is fetched here. `models/README.md` tells more of each.

use std::{fmt, str::FromStr};

use super::checkpoint::ModelSpec;

/// A published checkpoint, or one trained like it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// TinyLLaVA-Video-R1: reinforced to think before it answers.
    R1,
    /// R1 before its reinforcement: 16 annotated samples taught it the format.
    ColdStart,
    /// The same data as R1, trained to answer with the option only.
    Sft,
    /// TinyLLaVA-Video, 16 frames in 16 groups.
    Group16,
    /// TinyLLaVA-Video, one frame a second in 16 groups.
    Group1Fps,
    /// TinyLLaVA-Video, 16 frames, the resampler without groups.
    Naive16,
}

impl Variant {
    /// All of them.
    pub const ALL: [Variant; 6] = [
        Variant::R1,
        Variant::ColdStart,
        Variant::Sft,
        Variant::Group16,
        Variant::Group1Fps,
        Variant::Naive16,
    ];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Variant::R1 => "r1",
            Variant::ColdStart => "coldstart",
            Variant::Sft => "sft",
            Variant::Group16 => "group-16",
            Variant::Group1Fps => "group-1fps",
            Variant::Naive16 => "naive-16",
        }
    }

    /// Its repository without the owner. Not known to be published for [`Variant::Sft`]: this is the paper's name.
    pub fn repository(self) -> &'static str {
        match self {
            Variant::R1 => "TinyLLaVA-Video-R1",
            Variant::ColdStart => "TinyLLaVA-Video-Coldstart_NextQA_16",
            Variant::Sft => "TinyLLaVA-Video-SFT",
            Variant::Group16 => "TinyLLaVA-Video-Qwen2.5-3B-Group-16-512",
            Variant::Group1Fps => "TinyLLaVA-Video-Qwen2.5-3B-Group-1fps-512",
            Variant::Naive16 => "TinyLLaVA-Video-Qwen2.5-3B-Naive-16-512",
        }
    }

    /// The variant that `--model` names: by the repository, or by the last name of a directory it was downloaded to.
    pub fn of(spec: &ModelSpec) -> Option<Variant> {
        let name = match spec {
            ModelSpec::Nano | ModelSpec::Synthetic { .. } => return None,
            ModelSpec::Directory(_) => spec.to_string(),
            ModelSpec::Hub(repo) => repo.id.rsplit('/').next().unwrap_or_default().to_owned(),
        };
        Variant::ALL.into_iter().find(|variant| variant.repository().eq_ignore_ascii_case(&name))
    }

    /// Frames a second of video; `None`: a fixed number of frames, whatever the length.
    pub fn fps(self) -> Option<f64> {
        (self == Variant::Group1Fps).then_some(1.0)
    }

    /// Whether a question that says nothing of it gets the instruction to think first. The others were trained on
    /// questions as they are.
    pub fn thinks(self) -> bool {
        matches!(self, Variant::R1 | Variant::ColdStart)
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// No variant has this name.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no variant {0:?}: choose r1, coldstart, sft, group-16, group-1fps or naive-16")]
pub struct UnknownVariant(String);

impl FromStr for Variant {
    type Err = UnknownVariant;

    fn from_str(name: &str) -> Result<Self, UnknownVariant> {
        Variant::ALL
            .into_iter()
            .find(|variant| variant.name() == name)
            .ok_or_else(|| UnknownVariant(name.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(model: &str) -> Option<Variant> {
        Variant::of(&ModelSpec::parse(model).unwrap())
    }

    #[test]
    fn a_repository_names_its_variant() {
        assert_eq!(of("Zhang199/TinyLLaVA-Video-R1"), Some(Variant::R1));
        assert_eq!(of("Zhang199/TinyLLaVA-Video-R1@main"), Some(Variant::R1));
        assert_eq!(of("someone/tinyllava-video-r1"), Some(Variant::R1));
        assert_eq!(of("Zhang199/TinyLLaVA-Video-Qwen2.5-3B-Group-1fps-512"), Some(Variant::Group1Fps));
        assert_eq!(of("nano"), None);
        assert_eq!(of("synth:r1"), None);
        assert_eq!(of("someone/else"), None);
    }

    #[test]
    fn a_directory_of_that_name_is_the_variant() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("TinyLLaVA-Video-Coldstart_NextQA_16");
        std::fs::create_dir(&dir).unwrap();
        assert_eq!(of(dir.to_str().unwrap()), Some(Variant::ColdStart));
        assert_eq!(of(parent.path().to_str().unwrap()), None);
    }

    #[test]
    fn names_are_read_back() {
        for variant in Variant::ALL {
            assert_eq!(variant.to_string().parse(), Ok(variant));
        }
        assert!("r2".parse::<Variant>().is_err());
    }
}
