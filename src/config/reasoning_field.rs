//! Values of `--reasoning-field` and of a request's `reasoning_field`.
//!
//! Read where chat replies are written.

use std::{fmt, str::FromStr};

/// The name of the field that holds the thinking of a chat reply. Clients read one name or the
/// other, and some fail on both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ReasoningField {
    #[default]
    Both,
    ReasoningContent,
    Reasoning,
}

impl ReasoningField {
    pub const ALL: [ReasoningField; 3] =
        [ReasoningField::Both, ReasoningField::ReasoningContent, ReasoningField::Reasoning];

    pub fn name(self) -> &'static str {
        match self {
            ReasoningField::Both => "both",
            ReasoningField::ReasoningContent => "reasoning_content",
            ReasoningField::Reasoning => "reasoning",
        }
    }

    /// `thinking` as `reasoning_content` and as `reasoning`.
    pub fn place<T: Clone>(self, thinking: T) -> (Option<T>, Option<T>) {
        match self {
            ReasoningField::Both => (Some(thinking.clone()), Some(thinking)),
            ReasoningField::ReasoningContent => (Some(thinking), None),
            ReasoningField::Reasoning => (None, Some(thinking)),
        }
    }
}

impl fmt::Display for ReasoningField {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for ReasoningField {
    type Err = String;

    /// The error lists the names.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|field| field.name() == text);
        found.ok_or_else(|| Self::ALL.map(Self::name).join(", "))
    }
}
