//! Published models are served as they were trained: the repository's name says how frames are sampled and whether
//! the model is asked to think.

use std::path::Path;

use serde_json::{Value, json};

use super::{
    hub_fake::{Mischief, Setup},
    server_process::Server,
};

/// A server of `repository`, downloaded from a hub that has a tiny checkpoint under every name.
async fn serve(setup: &Setup, repository: &str) -> Server {
    let endpoint = setup.endpoint.clone();
    let cache = setup.cache.path().to_str().unwrap().to_owned();
    let repository = repository.to_owned();
    tokio::task::spawn_blocking(move || {
        let environment = [("HF_ENDPOINT", endpoint.as_str()), ("HF_HOME", &cache), ("NO_COLOR", "1")];
        Server::start_in(&environment, &["--model", &repository])
    })
    .await
    .unwrap()
}

async fn ask(server: &Server, content: Value) -> Value {
    let request = json!({"max_tokens": 1, "messages": [{"role": "user", "content": content}]});
    let request = reqwest::Client::new().post(format!("{}/v1/chat/completions", server.url)).json(&request);
    request.send().await.unwrap().error_for_status().unwrap().json().await.unwrap()
}

fn prompt_tokens(reply: &Value) -> u64 {
    reply["usage"]["prompt_tokens"].as_u64().unwrap()
}

/// The demo clip as a part, and its length in seconds.
fn clip() -> Value {
    use base64::Engine;
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/nano/demo/direction.mp4");
    let data = base64::prelude::BASE64_STANDARD.encode(std::fs::read(path).unwrap());
    json!([{"type": "video_url", "video_url": format!("data:video/mp4;base64,{data}")}])
}

#[tokio::test]
async fn the_repository_picks_frames_and_thinking() {
    let setup = Setup::new(Mischief::default()).await;
    let (thinks, plain) = (
        serve(&setup, "Zhang199/TinyLLaVA-Video-R1").await,
        serve(&setup, "Zhang199/TinyLLaVA-Video-Qwen2.5-3B-Group-1fps-512").await,
    );
    // R1: a fixed number of frames, and the instruction to think.
    let reply = ask(&thinks, clip()).await;
    assert_eq!(reply["model"], "Zhang199/TinyLLaVA-Video-R1");
    assert_eq!(reply["video"]["sampled_indices"].as_array().unwrap().len(), 4);
    // The other: one frame a second, and questions as they are.
    let reply = ask(&plain, clip()).await;
    let seconds = reply["video"]["duration"].as_f64().unwrap();
    assert!(seconds >= 2.0, "{seconds}");
    assert_eq!(reply["video"]["sampled_indices"].as_array().unwrap().len(), seconds as usize);
    let question = json!("Which way does it move?");
    let (with, without) = (ask(&thinks, question.clone()).await, ask(&plain, question).await);
    assert!(prompt_tokens(&with) > prompt_tokens(&without) + 10, "{with} {without}");
}

#[tokio::test]
async fn a_flag_says_how_an_unknown_checkpoint_was_trained() {
    let setup = Setup::new(Mischief::default()).await;
    let (endpoint, cache) = (setup.endpoint.clone(), setup.cache.path().to_str().unwrap().to_owned());
    let server = tokio::task::spawn_blocking(move || {
        let environment = [("HF_ENDPOINT", endpoint.as_str()), ("HF_HOME", &cache)];
        Server::start_in(&environment, &["--model", "me/my-own", "--variant", "group-1fps"])
    });
    let reply = ask(&server.await.unwrap(), clip()).await;
    let seconds = reply["video"]["duration"].as_f64().unwrap();
    assert_eq!(reply["video"]["sampled_indices"].as_array().unwrap().len(), seconds as usize);
}
