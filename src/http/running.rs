//! The chats that run now, by the ids clients know them by; and `POST /v1/chat/completions/{id}/end_thinking`.
//!
//! `http/chat.rs` enters each chat that holds a place in the engine, so there are never more than places. An entry goes with
//! the [`RunningChat`] it was made for.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use axum::{
    Json,
    extract::{Path, State, rejection::PathRejection},
};
use serde::Serialize;
use utoipa::ToSchema;

use super::{error::ApiError, openapi::NotRunning, state::AppState};
use crate::engine::EndThinking;

/// All that run; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct RunningChats(Arc<Mutex<HashMap<String, Arc<Chat>>>>);

#[derive(Debug)]
struct Chat {
    end: EndThinking,
    /// Choices that have not begun their answer.
    num_thinking: AtomicUsize,
}

/// One of them, as long as it runs.
#[derive(Debug)]
pub struct RunningChat {
    all: RunningChats,
    ids: Vec<String>,
    chat: Arc<Chat>,
}

impl RunningChats {
    /// Enters a chat under each of `ids` that no other has: clients may choose theirs.
    pub fn enter(&self, ids: [&str; 2], end: EndThinking, num_thinking: usize) -> RunningChat {
        let chat = Arc::new(Chat { end, num_thinking: AtomicUsize::new(num_thinking) });
        let mut chats = self.lock();
        let mut entered = Vec::new();
        for id in ids {
            if let Entry::Vacant(place) = chats.entry(id.to_owned()) {
                place.insert(chat.clone());
                entered.push(id.to_owned());
            }
        }
        drop(chats);
        RunningChat { all: self.clone(), ids: entered, chat }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Chat>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RunningChat {
    /// One choice has begun its answer, or has ended without one.
    pub fn answers(&self) {
        // At zero it stays.
        let _ = self
            .chat
            .num_thinking
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |num| num.checked_sub(1));
    }
}

impl Drop for RunningChat {
    fn drop(&mut self) {
        let mut chats = self.all.lock();
        self.ids.iter().for_each(|id| {
            chats.remove(id);
        });
    }
}

/// The reply: the chat will be asked for its answer at its next token.
#[derive(Debug, Serialize, ToSchema)]
pub struct ThinkingEnded {
    id: String,
    object: &'static str,
    accepted: bool,
}

/// `POST /v1/chat/completions/{id}/end_thinking`: "answer now". The id is the reply's, or the `x-request-id` of the request.
///
/// # Errors
/// 404 when no such chat runs, 409 when it thinks no more.
#[utoipa::path(post, path = "/v1/chat/completions/{id}/end_thinking", tag = "chat", operation_id = "endThinking",
    summary = "Ask a running chat completion for its answer, now",
    params(("id" = String, Path, description = "The id of the reply, or the `x-request-id` of the request.")),
    responses((status = 200, description = "The thinking ends with the next token.", body = ThinkingEnded), NotRunning))]
pub async fn end_thinking(
    State(state): State<AppState>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<ThinkingEnded>, ApiError> {
    let Path(id) = id.map_err(|_| ApiError::NoSuchRoute)?;
    let chat = state.chats().lock().get(&id).cloned().ok_or(ApiError::NoSuchChat)?;
    if chat.num_thinking.load(Ordering::Relaxed) == 0 {
        return Err(ApiError::ThinksNoMore);
    }
    chat.end.request();
    Ok(Json(ThinkingEnded { id, object: "chat.completion.end_thinking", accepted: true }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chat_is_known_by_its_ids_as_long_as_it_runs() {
        let chats = RunningChats::default();
        let known = |id: &str| chats.lock().contains_key(id);
        let first = chats.enter(["a", "same"], EndThinking::default(), 1);
        let second = chats.enter(["b", "same"], EndThinking::default(), 1);
        assert!(known("a") && known("b") && known("same"));
        drop(second);
        assert!(known("a") && !known("b") && known("same"), "the id is still the first one's");
        drop(first);
        assert!(chats.lock().is_empty());
    }
}
