//! A server with several engines: which of them gets a request, and what they are to clients and operators.

use std::time::Duration;

use serde_json::{Value, json};
use tinyllava::{config::Config, model::fake::FakeModel};

use crate::{http_setup::*, server_process};

/// A model that answers with its number.
fn numbered(number: usize) -> FakeModel {
    FakeModel::saying(&format!("<think>x</think><answer>{number}</answer>"))
}

/// A ready server with an engine on each of `models`.
async fn fleet(config: Config, models: Vec<FakeModel>) -> Server {
    let state = state(config);
    load_all(&state, models);
    serve(state).await
}

/// The clip, sampled to so many frames: for the caches each is a video of its own.
fn video(num_frames: usize) -> Value {
    about(&clip_url(), json!({"media_io_kwargs": {"video": {"num_frames": num_frames}}}))
}

async fn sequences(server: &Server) -> [f64; 2] {
    [
        server.metric("tinyllava_engine_sequences{engine=\"0\"}").await,
        server.metric("tinyllava_engine_sequences{engine=\"1\"}").await,
    ]
}

/// Two engines that are busy with a request for as long as it is wanted, and each at this many at a time.
async fn busy_fleet(max_running: usize) -> Server {
    let mut config = config();
    config.engine.max_running_sequences = max_running;
    config.engine.max_waiting_sequences = 1;
    let model = || slow_model(&"word ".repeat(500), Duration::from_millis(20));
    fleet(config, vec![model(), model()]).await
}

/// Sends a request to a busy fleet, and waits until an engine works on it.
async fn begin(server: &Server, mut request: Value) -> Events {
    request["stream"] = json!(true);
    request["max_tokens"] = json!(2000);
    let mut events = Events::of(server.post(&request).send().await.unwrap());
    let is_text = |event: &Event| match event {
        Event::Data(chunk) => ["content", "reasoning_content"]
            .iter()
            .any(|field| chunk["choices"][0]["delta"][field].as_str().is_some_and(|text| !text.is_empty())),
        _ => false,
    };
    while !is_text(&events.next().await.expect("the stream is over too soon")) {}
    events
}

#[tokio::test]
async fn a_known_video_goes_to_the_engine_that_holds_it() {
    let server = fleet(config(), vec![numbered(0), numbered(1)]).await;
    for (num_frames, engine, is_known) in
        [(1, "0", false), (2, "1", false), (3, "0", false), (3, "0", true), (2, "1", true), (1, "0", true)]
    {
        let reply = server.ask(&video(num_frames)).await;
        assert_eq!(reply["choices"][0]["message"]["content"], engine, "{num_frames} frames");
        let prompt = reply["usage"]["prompt_tokens"].as_u64().unwrap();
        let cached = reply["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
        // All but the block of the last token.
        assert_eq!(cached + 16 >= prompt, is_known, "{num_frames} frames: {cached} of {prompt}");
    }
    server.until_idle().await;
    assert_eq!(server.metric("tinyllava_cache_queries_total{cache=\"encoder\"}").await, 3.0);
}

#[tokio::test]
async fn two_engines_share_the_load() {
    let server = busy_fleet(64).await;
    let mut running = vec![];
    for num_frames in 1..=6 {
        running.push(begin(&server, video(num_frames)).await);
    }
    assert_eq!(sequences(&server).await, [3.0, 3.0]);
    assert_eq!(server.metric("vllm:num_requests_running{model_name=\"fake\"}").await, 6.0);
    drop(running);
    server.until_idle().await;
    assert_eq!(sequences(&server).await, [0.0, 0.0]);
}

#[tokio::test]
async fn an_engine_that_is_clearly_busier_passes_its_video_on() {
    // A lead of one is allowed.
    let server = busy_fleet(4).await;
    let mut running = vec![];
    for expected in [[1.0, 0.0], [2.0, 0.0], [2.0, 1.0], [2.0, 2.0]] {
        running.push(begin(&server, video(2)).await);
        assert_eq!(sequences(&server).await, expected);
    }
}

#[tokio::test]
async fn the_choices_of_a_request_stay_together() {
    let server = busy_fleet(64).await;
    let _running = begin(&server, request(json!("Hi"), json!({"n": 3}))).await;
    eventually("three sequences run", async || sequences(&server).await == [3.0, 0.0]).await;
}

#[tokio::test]
async fn all_engines_run_their_own_and_wait_in_one_queue() {
    let server = busy_fleet(1).await;
    let ask = || request(json!("Hi"), json!({"stream": true}));
    let _running = [begin(&server, ask()).await, begin(&server, ask()).await];
    let _waiting = server.post(&ask()).send().await.unwrap();
    let (status, refused) = error(server.post(&ask()).send().await.unwrap()).await;
    assert_eq!((status, &refused["code"]), (429, &json!("queue_full")));
}

#[tokio::test]
async fn one_lost_device_ends_the_whole_server() {
    let models = [0, 1].map(|number| {
        let mut model = numbered(number);
        model.device_poison = Some(u32::from(b'#'));
        model
    });
    let state = state(config());
    load_all(&state, models.into());
    let engine = state.loaded().unwrap().engine.clone();
    let server = serve(state).await;
    assert_eq!(server.get("/ready").send().await.unwrap().status(), 200);
    let (status, _) = error(server.post(&request(json!("#"), json!({}))).send().await.unwrap()).await;
    assert_eq!(status, 500);
    // The command waits for this, and exits with 1.
    engine.stopped().await;
    for answer in [server.get("/ready"), server.post(&request(json!("Hi"), json!({})))] {
        let (status, refused) = error(answer.send().await.unwrap()).await;
        assert_eq!((status, &refused["code"]), (503, &json!("engine_failed")));
    }
    assert_eq!(server.get("/health").send().await.unwrap().status(), 200);
}

#[test]
fn two_engines_on_a_cpu_divide_its_threads_and_give_the_same_reply() {
    let devices = ["--devices", "cpu,cpu", "--threads", "2", "--kv-cache-mib", "64", "--log-format", "json"];
    let server = server_process::Server::start(&devices);
    let loaded: Vec<Value> =
        server.before.iter().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let loaded: Vec<&Value> = loaded.iter().filter(|line| line["message"] == "model loaded").collect();
    assert_eq!(loaded.iter().map(|line| &line["threads"]).collect::<Vec<_>>(), [1, 1]);
    let question = json!([{"role": "user", "content": "Hello?"}]);
    let asked =
        json!({"model": "nano", "max_tokens": 20, "temperature": 0, "messages": question}).to_string();
    let reply = || -> Value {
        let reply = server.post("id", &asked).wait_with_output().unwrap();
        serde_json::from_slice(&reply.stdout).unwrap()
    };
    // Each goes to the engine that has waited longest: the second finds nothing cached.
    let (one, other) = (reply(), reply());
    assert_eq!(one["choices"][0]["message"], other["choices"][0]["message"]);
    for reply in [one, other] {
        assert_eq!(reply["usage"]["prompt_tokens_details"]["cached_tokens"], 0, "{reply}");
    }
    server.stop();
}
