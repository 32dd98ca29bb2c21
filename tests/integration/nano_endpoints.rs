//! The binary on the embedded model: an uploaded clip is asked about by its id, also after a restart and in a
//! conversation that goes on.

use reqwest::{
    Client, Response,
    multipart::{Form, Part},
};
use serde_json::{Value, json};

use crate::{http_setup::success, server_process::Server};

const CLIP: &str = "models/nano/demo/count.mp4";

/// Question and right answer.
fn question() -> (String, String) {
    let text = std::fs::read_to_string("models/nano/demo/questions.json").unwrap();
    let entries: Vec<Value> = serde_json::from_str(&text).unwrap();
    let entry = entries.iter().find(|entry| entry["video"] == "count.mp4").unwrap();
    let field = |name: &str| entry[name].as_str().unwrap().to_owned();
    (field("question"), field("answer"))
}

async fn post(server: &Server, path: &str, body: &Value) -> Value {
    let sent: Response = Client::new().post(format!("{}{path}", server.url)).json(body).send().await.unwrap();
    success(sent).await
}

fn output_text(response: &Value) -> &str {
    let items = response["output"].as_array().unwrap();
    let message = items.iter().find(|item| item["type"] == "message").unwrap();
    message["content"][0]["text"].as_str().unwrap()
}

#[tokio::test]
async fn an_uploaded_clip_is_asked_about_before_and_after_a_restart() {
    let dir = tempfile::TempDir::new().unwrap();
    let flags = ["--files-dir", dir.path().to_str().unwrap()];
    let (question, answer) = question();
    let server = Server::start(&flags);
    let form = Form::new()
        .text("purpose", "user_data")
        .part("file", Part::bytes(std::fs::read(CLIP).unwrap()).file_name("count.mp4"));
    let sent = Client::new().post(format!("{}/v1/files", server.url)).multipart(form).send().await.unwrap();
    let id = success(sent).await["id"].clone();
    let content = json!([{"type": "file", "file": {"file_id": id}}, {"type": "text", "text": question}]);
    let chat = json!({"messages": [{"role": "user", "content": content}], "temperature": 0});
    let reply = post(&server, "/v1/chat/completions", &chat).await;
    assert_eq!(reply["choices"][0]["message"]["content"], answer, "{reply}");
    server.stop();

    let server = Server::start(&flags);
    let content = json!([{"type": "input_file", "file_id": id}, {"type": "input_text", "text": question}]);
    let request = json!({"input": [{"role": "user", "content": content}], "temperature": 0});
    let response = post(&server, "/v1/responses", &request).await;
    assert_eq!(output_text(&response), answer, "{response}");
    assert_eq!(
        response["output"][0]["summary"][0]["text"], reply["choices"][0]["message"]["reasoning_content"],
        "the same thinking as in the chat"
    );
    let schema = json!({"type": "object", "properties": {"option": {"enum": ["A", "B", "C"]}},
        "required": ["option"], "additionalProperties": false});
    let mut formed = request.clone();
    formed["text"] = json!({"format": {"type": "json_schema", "name": "answer", "schema": schema}});
    let formed = post(&server, "/v1/responses", &formed).await;
    let value: Value = serde_json::from_str(output_text(&formed)).unwrap();
    assert!(["A", "B", "C"].contains(&value["option"].as_str().unwrap()), "{formed}");
    let next = json!({"input": question, "previous_response_id": response["id"], "temperature": 0});
    let next = post(&server, "/v1/responses", &next).await;
    let cached = &next["usage"]["input_tokens_details"]["cached_tokens"];
    assert!(cached.as_u64() > Some(0), "the video's tokens are in the prefix cache: {next}");
    server.stop();
}
