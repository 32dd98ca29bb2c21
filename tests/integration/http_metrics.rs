//! The numbers move as the requests do: over sockets, with real videos.

use std::time::Duration;

use serde_json::json;
use tinyllava::{media::MediaError, model::fake::FakeModel, telemetry::metrics};

use crate::http_setup::*;

/// Asserts values of metrics with all their labels.
async fn assert_metrics(server: &Server, expected: &[(&str, f64)]) {
    for (name, value) in expected {
        assert_eq!(server.metric(name).await, *value, "{name}");
    }
}

#[tokio::test]
async fn a_video_moves_the_media_stage_once_and_the_caches_after() {
    let server = simple_server().await;
    server.ask(&about(&clip_url(), json!({}))).await;
    let decoded = server.metric("tinyllava_video_frames_decoded_total").await;
    assert!((4.0..=20.0).contains(&decoded), "{decoded}");
    server.ask(&about(&clip_url(), json!({"stream": false}))).await;
    server.until_idle().await;
    assert_metrics(
        &server,
        &[
            ("tinyllava_video_frames_decoded_total", decoded),
            ("tinyllava_video_frames_total", 8.0),
            ("tinyllava_video_seconds_total", 4.0),
            ("tinyllava_cache_queries_total{cache=\"frames\"}", 2.0),
            ("tinyllava_cache_hits_total{cache=\"frames\"}", 1.0),
            ("tinyllava_stage_seconds_count{stage=\"decode_wait\"}", 1.0),
            ("tinyllava_time_to_first_token_seconds_count", 2.0),
            ("tinyllava_time_to_first_answer_token_seconds_count", 2.0),
            ("tinyllava_request_seconds_count{outcome=\"completed\"}", 2.0),
            (
                "tinyllava_tokens_total{kind=\"reasoning\"}",
                2.0 * "<think>The person bends.</think>".len() as f64,
            ),
            ("tinyllava_decoders{state=\"running\"}", 0.0),
            ("tinyllava_decoders{state=\"waiting\"}", 0.0),
            ("tinyllava_decoder_places", 4.0),
            // The one that asks.
            ("tinyllava_http_requests_in_flight", 1.0),
        ],
    )
    .await;
    assert!(server.metric("tinyllava_kv_blocks{state=\"cached\"}").await > 0.0);
}

#[tokio::test]
async fn a_reply_without_an_answer_has_no_first_answer_token() {
    let server = server(config(), FakeModel::saying("<think>and so on")).await;
    server.ask(&request(json!("Hi"), json!({}))).await;
    assert_metrics(
        &server,
        &[
            ("tinyllava_time_to_first_token_seconds_count", 1.0),
            ("tinyllava_time_to_first_answer_token_seconds_count", 0.0),
        ],
    )
    .await;
}

#[tokio::test]
async fn blocks_are_used_cached_or_free_and_a_running_request_is_seen() {
    let server = server(config(), slow_model(&"word ".repeat(400), Duration::from_millis(5))).await;
    let body = request(json!("Hi"), json!({"stream": true, "max_tokens": 1000}));
    let mut events = Events::of(server.post(&body).send().await.unwrap());
    assert!(matches!(events.next().await, Some(Event::Data(_))));
    let blocks =
        async |state: &str| server.metric(&format!("tinyllava_kv_blocks{{state=\"{state}\"}}")).await;
    eventually("blocks are used", async || blocks("used").await > 0.0).await;
    assert_metrics(&server, &[("tinyllava_http_requests_in_flight", 2.0)]).await;
    drop(events);
    server.until_idle().await;
    let total = blocks("used").await + blocks("cached").await + blocks("free").await;
    let text = server.metrics().await;
    assert!(text.contains(&format!("num_gpu_blocks=\"{total}\"")), "{total} blocks\n{text}");
    eventually("the client is missed", async || {
        server.metric("tinyllava_request_seconds_count{outcome=\"client_left\"}").await == 1.0
    })
    .await;
}

#[tokio::test]
async fn faults_are_counted_by_whose_they_are() {
    let mut model = FakeModel::saying(REPLY);
    model.poison = Some(u32::from(b'#'));
    let server = server(config(), model).await;
    let (status, _) =
        error(server.post(&about("data:video/mp4;base64,AAAA", json!({}))).send().await.unwrap()).await;
    assert_eq!(status, 415);
    let (status, _) = error(server.post(&request(json!("#"), json!({}))).send().await.unwrap()).await;
    assert_eq!(status, 500);
    assert_metrics(
        &server,
        &[
            ("tinyllava_media_errors_total{reason=\"unsupported\"}", 1.0),
            ("tinyllava_media_errors_total{reason=\"undecodable\"}", 0.0),
            ("tinyllava_request_seconds_count{outcome=\"refused\"}", 1.0),
            ("tinyllava_request_seconds_count{outcome=\"failed\"}", 1.0),
            ("tinyllava_http_requests_total{method=\"POST\",route=\"/v1/chat/completions\",status=\"500\"}", 1.0),
            ("tinyllava_http_requests_total{method=\"POST\",route=\"/v1/chat/completions\",status=\"200\"}", 0.0),
            // A fault in the probe is no run of it.
            ("tinyllava_stage_seconds_count{stage=\"probe\"}", 0.0),
        ],
    )
    .await;
}

#[tokio::test]
async fn a_server_says_what_it_is_at_and_counts_whom_it_turns_away() {
    let state = state(config());
    let mut server = serve(state.clone()).await;
    let ask = request(json!("Hi"), json!({"stream": true, "max_tokens": 1000}));
    assert_eq!(error(server.post(&ask).send().await.unwrap()).await.0, 503);
    let states = async |loaded, ready, draining| {
        let names = ["tinyllava_model_loaded", "tinyllava_ready", "tinyllava_draining"];
        let expected: Vec<_> = names.into_iter().zip([loaded, ready, draining]).collect();
        assert_metrics(&server, &expected).await;
    };
    states(0.0, 0.0, 0.0).await;
    assert_metrics(&server, &[("tinyllava_rejections_total{reason=\"loading\"}", 1.0)]).await;
    load(&state, slow_model(&"word ".repeat(200), Duration::from_millis(5)));
    states(1.0, 1.0, 0.0).await;
    let mut events = Events::of(server.post(&ask).send().await.unwrap());
    assert!(matches!(events.next().await, Some(Event::Data(_))));
    state.drain().begin();
    states(1.0, 0.0, 1.0).await;
    assert_eq!(error(server.post(&ask).send().await.unwrap()).await.0, 503);
    assert_metrics(&server, &[("tinyllava_rejections_total{reason=\"draining\"}", 1.0)]).await;
    drop(events);
    server.shut_down().await.unwrap().unwrap();
}

#[test]
fn every_reason_of_a_media_error_is_counted_from_zero() {
    let text = String::new;
    let all = [
        MediaError::Refused { param: "video", message: text() },
        MediaError::FetchFailed(text()),
        MediaError::TooManyBytes { max_video_bytes: 1 },
        MediaError::Unsupported(text()),
        MediaError::Undecodable(text()),
        MediaError::DecodeTimeout { seconds: 1 },
        MediaError::Internal(text()),
    ];
    assert_eq!(all.map(|error| error.reason()), metrics::MEDIA_ERRORS);
}
