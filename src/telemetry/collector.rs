//! The HTTP client through which spans leave.
//!
//! Used by `traces.rs`, whose exporter calls it on a thread of its own: requests run on the server's runtime. Redirects and
//! proxies are not followed: spans go where the operator said.

use std::time::Duration;

use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use reqwest::{Body, Client, redirect::Policy};
use tokio::runtime::Handle;

/// More of an answer is not read.
const MAX_ANSWER_BYTES: usize = 64 << 10;

/// See the module.
#[derive(Debug)]
pub struct Collector {
    client: Client,
    runtime: Handle,
}

impl Collector {
    /// A client of the runtime that this is called on.
    ///
    /// # Errors
    /// When TLS cannot be set up.
    pub fn new(timeout: Duration) -> reqwest::Result<Self> {
        let client = Client::builder().timeout(timeout).redirect(Policy::none()).no_proxy().build()?;
        Ok(Collector { client, runtime: Handle::current() })
    }
}

#[async_trait::async_trait]
impl HttpClient for Collector {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let request = reqwest::Request::try_from(request.map(Body::from))?;
        let client = self.client.clone();
        self.runtime.spawn(async move { send(&client, request).await }).await?
    }
}

async fn send(client: &Client, request: reqwest::Request) -> Result<Response<Bytes>, HttpError> {
    let mut response = client.execute(request).await?;
    let mut answer = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        if answer.len() + chunk.len() > MAX_ANSWER_BYTES {
            return Err("the collector's answer is too long".into());
        }
        answer.extend_from_slice(&chunk);
    }
    let mut whole = Response::new(Bytes::from(answer));
    *whole.status_mut() = response.status();
    *whole.headers_mut() = std::mem::take(response.headers_mut());
    Ok(whole)
}
