//! Messages of errors: at most a few words of the request, never a Rust type, and a hint where one
//! helps.

use futures_util::{StreamExt, stream};
use reqwest::{
    Method, Response,
    multipart::{Form, Part},
};
use serde_json::{Map, Value, json};
use tinyllava::{http::openapi, model::fake::FakeModel};

use crate::http_setup::*;

/// A letter that no message of the server repeats on its own.
const LETTER: &str = "ж";
/// Most characters of input in a reply.
const MAX_ECHO_CHARS: usize = 200;
/// Longest message.
const MAX_MESSAGE_CHARS: usize = 400;
/// Words that only Rust knows.
const RUST_WORDS: [&str; 30] = [
    "struct",
    "enum",
    "tuple",
    "newtype",
    "variant",
    "untagged",
    "serde",
    "Deserializer",
    "Option",
    "Vec",
    "String",
    "Box",
    "HashMap",
    "BTreeMap",
    "Map",
    "Value",
    "TextOr",
    "usize",
    "isize",
    "u8",
    "u16",
    "u32",
    "u64",
    "i8",
    "i16",
    "i32",
    "i64",
    "f32",
    "f64",
    "bool",
];

/// A value of every kind of JSON, large where it can be.
fn values() -> Vec<Value> {
    let long = LETTER.repeat(20_000);
    vec![
        json!(long),
        json!([long, long]),
        json!({long.as_str(): long}),
        json!([{long.as_str(): 1}]),
        json!([[long]]),
        json!({"type": long, "url": long, "data": long, "content": long}),
        json!({"type": 5, "url": [], "role": {}, "content": 7}),
        json!(-1e300),
        json!(1e300),
        json!(1.5),
        json!(-7),
        json!(i64::MIN),
        json!(u64::MAX),
        json!(true),
        json!([]),
        json!({}),
        json!("1, expected u64 ASSISTANT:"),
    ]
}

/// The fields of a wire type, as the document has them.
fn fields(schema: &str) -> Vec<String> {
    // The document has any value in its place.
    if schema == "InputItem" {
        return ["type", "role", "content", "id", "status", "odd"].map(String::from).to_vec();
    }
    let document = openapi::document();
    let properties = &document["components"]["schemas"][schema]["properties"];
    let names = properties.as_object().unwrap_or_else(|| panic!("no schema {schema}")).keys();
    names.cloned().collect()
}

fn is_rust(message: &str) -> bool {
    let mut words = message.split(|c: char| !c.is_alphanumeric() && c != '_');
    message.contains("::") || words.any(|word| RUST_WORDS.contains(&word))
}

/// Holds a reply to the rules; the status.
async fn check(what: &str, response: Response) -> u16 {
    let status = response.status().as_u16();
    let text = response.text().await.unwrap();
    if status == 200 {
        return status;
    }
    assert!((400..500).contains(&status), "{what}: {status}: {text:.300}");
    let error = serde_json::from_str::<Value>(&text).unwrap()["error"].clone();
    let message = error["message"].as_str().unwrap();
    assert!(message.chars().count() <= MAX_MESSAGE_CHARS, "{what}: {message}");
    // In paths a letter is six characters.
    let num_echoed = text.matches(LETTER).count() + 6 * text.matches("%D0%B6").count();
    assert!(num_echoed <= MAX_ECHO_CHARS, "{what}: {num_echoed} characters of input in {text}");
    assert!(text.matches("00").count() <= MAX_ECHO_CHARS / 2, "{what}: a long number in {text}");
    // What the client itself sent may say anything.
    let own_words = message.replace("1, expected u64", "");
    assert!(!is_rust(&own_words), "{what}: {message}");
    status
}

/// A path, and a body for each wire type and field of it.
fn requests() -> Vec<(&'static str, String, Value)> {
    let chat = |part: Value| json!({"model": MODEL, "messages": [{"role": "user", "content": [part]}]});
    let mut list = vec![];
    let mut add = |path: &'static str, schema: &str, body: &dyn Fn(Map<String, Value>) -> Value| {
        for field in fields(schema) {
            for value in values() {
                let kind = value.to_string().chars().take(12).collect::<String>();
                let object = Map::from_iter([(field.clone(), value)]);
                list.push((path, format!("{path}: {schema}.{field}: {kind}"), body(object)));
            }
        }
    };
    let over = |mut base: Value, object: Map<String, Value>| {
        base.as_object_mut().unwrap().extend(object);
        base
    };
    add(CHAT, "ChatRequest", &|object| over(request(json!("Hi"), json!({})), object));
    add(
        CHAT,
        "Message",
        &|object| json!({"messages": [over(json!({"role": "user", "content": "Hi"}), object)]}),
    );
    add(CHAT, "ContentPart", &|object| chat(over(json!({"type": "video_url"}), object)));
    add(CHAT, "VideoUrl", &|object| chat(json!({"type": "video_url", "video_url": object})));
    add(CHAT, "InputVideo", &|object| chat(json!({"type": "input_video", "input_video": object})));
    add(CHAT, "FilePart", &|object| chat(json!({"type": "file", "file": object})));
    add(CHAT, "ImageUrl", &|object| chat(json!({"type": "image_url", "image_url": object})));
    for (field, schema) in [
        ("stream_options", "StreamOptions"),
        ("chat_template_kwargs", "ChatTemplateKwargs"),
        ("media_io_kwargs", "MediaIoKwargs"),
    ] {
        add(CHAT, schema, &|object| request(json!("Hi"), json!({field: object, "stream": true})));
    }
    add(CHAT, "SamplingKnobs", &|object| request(json!("Hi"), json!({"media_io_kwargs": {"video": object}})));
    add("/v1/completions", "CompletionRequest", &|object| over(json!({"prompt": "Hi ASSISTANT:"}), object));
    add("/v1/completions", "ChatRequest", &|object| over(json!({"prompt": "Hi ASSISTANT:"}), object));
    add("/v1/responses", "ResponsesRequest", &|object| over(json!({"input": "Hi"}), object));
    add(
        "/v1/responses",
        "InputItem",
        &|object| json!({"input": [over(json!({"role": "user", "content": "Hi"}), object)]}),
    );
    add("/v1/responses", "ReasoningOptions", &|object| json!({"input": "Hi", "reasoning": object}));
    add("/v1/responses", "TextOptions", &|object| json!({"input": "Hi", "text": object}));
    add("/tokenize", "TokenizeRequest", &|object| over(json!({"prompt": "Hi ASSISTANT:"}), object));
    add("/detokenize", "DetokenizeRequest", &|object| over(json!({"tokens": [1]}), object));
    list
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_error_repeats_more_than_200_characters_or_names_a_rust_type() {
    let server = server(config(), FakeModel::saying(REPLY)).await;
    let requests = requests();
    let num_requests = requests.len();
    let checked = stream::iter(requests)
        .map(async |(path, what, body)| check(&what, server.send_json(path, &body).await).await);
    let statuses: Vec<u16> = checked.buffer_unordered(4).collect().await;
    let num_refused = statuses.iter().filter(|status| **status != 200).count();
    assert_eq!(statuses.len(), num_requests);
    assert!(num_refused * 10 > num_requests * 7, "only {num_refused} of {num_requests} were refused");
}

#[tokio::test]
async fn bodies_of_another_form_are_not_repeated() {
    let server = simple_server().await;
    let long = LETTER.repeat(1_000_000);
    let bodies = [
        json!(long).to_string(),
        json!([long]).to_string(),
        json!({long.as_str(): 1}).to_string(),
        format!("{{\"messages\": {long}"),
        format!("{{\"messages\": [], \"{long}\": "),
        format!("\"{long}"),
        long.clone(),
        String::new(),
        "[]".into(),
        "null".into(),
        "{}".into(),
    ];
    for path in [CHAT, "/v1/completions", "/v1/responses", "/tokenize", "/detokenize"] {
        for body in &bodies {
            let request = server.client.post(format!("{}{path}", server.url)).body(body.clone());
            let response = request.header("content-type", "application/json").send().await.unwrap();
            let what = format!("{path} {body:.20}");
            assert_eq!(check(&what, response).await, 400, "{what}");
        }
    }
    for (path, known) in [(CHAT, "request"), ("/v1/files", "purpose")] {
        let forms = [
            Form::new().part(long[..2000].to_owned(), Part::text(long.clone())),
            Form::new().part(known, Part::text(long.clone())),
            Form::new().part(known, Part::text(long.clone())).part("video", Part::text("x")),
            Form::new().part("file", Part::text("x").file_name(long[..2000].to_owned())),
        ];
        for form in forms {
            let status = check(path, server.send_form(path, form).await).await;
            assert!(status == 400, "{path}: {status}");
        }
    }
    let form = server.client.post(format!("{}{CHAT}", server.url)).body(long.clone());
    let form = form.header("content-type", format!("multipart/form-data; boundary={}", "b".repeat(60)));
    check("no part", form.send().await.unwrap()).await;
}

#[tokio::test]
async fn names_in_paths_and_queries_are_not_repeated() {
    let server = simple_server().await;
    let long = LETTER.repeat(2000);
    for path in [
        format!("/v1/models/{long}"),
        format!("/v1/files/{long}"),
        format!("/v1/files/{long}/content"),
        format!("/v1/responses/{long}"),
        format!("/v1/responses/resp_1?{long}={long}"),
        format!("/v1/files?{long}=1"),
        format!("/v1/files?limit={long}"),
        format!("/v1/files?order={long}"),
        format!("/v1/files?after={long}"),
        format!("/{long}"),
        format!("/chat/completions/{long}"),
    ] {
        let what: String = path.chars().take(20).collect();
        let status = check(&what, server.get(&path).send().await.unwrap()).await;
        assert!([400, 404].contains(&status), "{path:.30}: {status}");
    }
    let end = format!("{CHAT}/{long}/end_thinking");
    assert_eq!(check("end_thinking", server.send_json(&end, &json!({})).await).await, 404);
}

#[tokio::test]
async fn a_fault_is_told_in_plain_words_with_its_path() {
    let server = simple_server().await;
    let part = |part: Value| json!({"messages": [{"role": "user", "content": [part]}]});
    let responses = |content: Value| json!({"input": [{"role": "user", "content": content}]});
    for (path, body, param, message) in [
        (CHAT, json!({"messages": "Hi"}), "messages", "messages must be a list, but is the text \"Hi\""),
        (CHAT, json!({}), "messages", "the field \"messages\" is missing; add it"),
        (
            CHAT,
            json!({"messages": [{"role": "user", "content": 5}]}),
            "messages[0].content",
            "messages[0].content must be text or a list, but is the number 5",
        ),
        (
            CHAT,
            part(json!({"type": "video_url", "video_url": 5})),
            "messages[0].content[0].video_url",
            "messages[0].content[0].video_url must be text or an object, but is the number 5",
        ),
        (
            CHAT,
            part(json!({"type": "text", "text": ["a"]})),
            "messages[0].content[0].text",
            "messages[0].content[0].text must be text, but is a list",
        ),
        (
            CHAT,
            json!({"messages": [], "max_tokens": 1.5}),
            "max_tokens",
            "max_tokens must be a whole number, 0 or more, but is the number 1.5",
        ),
        (
            "/v1/completions",
            json!({"prompt": "Hi", "temperature": "hot"}),
            "temperature",
            "temperature must be a number, but is the text \"hot\"",
        ),
        (
            "/v1/responses",
            responses(json!([{"type": "input_text", "text": 5}])),
            "input[0].content[0].text",
            "input[0].content[0].text must be text, but is the number 5",
        ),
        ("/v1/responses", json!({"input": 5}), "input", "input must be text or a list, but is the number 5"),
        (
            "/detokenize",
            json!({"tokens": [true]}),
            "tokens[0]",
            "tokens[0] must be a whole number, but is true",
        ),
    ] {
        let (status, error) = error(server.send_json(path, &body).await).await;
        assert_eq!((status, &error["param"], &error["message"]), (400, &json!(param), &json!(message)));
    }
}

#[tokio::test]
async fn a_wrong_path_is_told_the_right_one() {
    let server = simple_server().await;
    for (path, hint) in [
        ("/chat/completions", Some("/v1/chat/completions")),
        ("/v1/v1/chat/completions", Some("/v1/chat/completions")),
        ("/v1/chat/completions/", Some("/v1/chat/completions")),
        ("/api/v1/chat/completions", Some("/v1/chat/completions")),
        ("/responses", Some("/v1/responses")),
        ("/v1/tokenize", Some("/tokenize")),
        ("/v1/embeddings", None),
    ] {
        let (status, error) = error(server.send_json(path, &json!({})).await).await;
        assert_eq!((status, &error["code"]), (404, &json!("not_found")), "{path}");
        let end = hint.map_or("; see /openapi.json".into(), |hint| format!("; did you mean {hint}?"));
        assert_eq!(error["message"], format!("no route for POST {path}{end}"));
    }
    for path in ["/models", "/v1/models/"] {
        let (status, error) = error(server.get(path).send().await.unwrap()).await;
        assert_eq!(status, 404);
        assert_eq!(error["message"], format!("no route for GET {path}; did you mean /v1/models?"));
    }
}

#[tokio::test]
async fn a_wrong_method_is_told_the_right_one() {
    let server = simple_server().await;
    for (method, path, allow, message) in [
        (Method::GET, CHAT, "POST", "/v1/chat/completions does not take GET; send POST"),
        (Method::PUT, "/v1/files", "POST,GET,HEAD", "/v1/files does not take PUT; send POST or GET"),
        (Method::POST, "/v1/models", "GET,HEAD", "/v1/models does not take POST; send GET"),
        (
            Method::PATCH,
            "/v1/files/a",
            "GET,HEAD,DELETE",
            "/v1/files/{id} does not take PATCH; send GET or DELETE",
        ),
    ] {
        let request = server.client.request(method, format!("{}{path}", server.url));
        let response = request.send().await.unwrap();
        let allowed = response.headers()["allow"].to_str().unwrap().to_owned();
        let sorted = |list: &str| {
            let mut names: Vec<String> = list.split(',').map(|name| name.trim().to_owned()).collect();
            names.sort();
            names
        };
        assert_eq!(sorted(&allowed), sorted(allow), "{path}");
        let (status, error) = error(response).await;
        assert_eq!((status, &error["code"]), (405, &json!("method_not_allowed")));
        assert_eq!(error["message"], message);
    }
}
