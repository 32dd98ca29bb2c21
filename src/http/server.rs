//! Connections: accepting, limits against slow clients, and the end of all of them at shutdown.
//!
//! [`run`] and [`run_metrics`] are called by `cli/serve.rs` and tests. HTTP/1.1 only, with or without TLS: HTTP/2
//! belongs to the proxy in front.

use std::{
    convert::Infallible,
    future::{Future, poll_fn},
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use axum::{
    Router,
    http::{HeaderValue, header},
};
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_io_timeout::TimeoutWriter;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt;

use super::{files, metrics_router, router, state::AppState, tls};

/// How long a connection may take to exchange its last bytes when no request is left.
const CLOSING_TIME: Duration = Duration::from_secs(2);
/// Pause after a failed accept (too many open files): another try at once would meet the same.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves `listener` until `shutdown` completes. Then it says that it is not ready, takes on what still comes for
/// `drain_delay`, refuses new work, waits up to `drain_timeout` for running requests (probes are answered meanwhile),
/// and closes all connections.
///
/// # Errors
/// None that ends the server so far; callers must still expect them.
pub async fn run(
    listener: TcpListener,
    state: AppState,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let server = Server::new(router(state.clone()), state, true);
    // Stop on drop: connections are tasks, and must not outlive a dropped server.
    let _kill_on_drop = server.kill.clone().drop_guard();
    tokio::select! {
        () = server.accept_all(&listener) => {}
        () = server.drain_after(shutdown) => {}
        () = files::sweep(server.state.clone()) => {}
    }
    drop(listener);
    server.close_all().await;
    Ok(())
}

/// Answers `/metrics` on `listener`, never with TLS, until it is dropped. Never completes.
pub async fn run_metrics(listener: TcpListener, state: AppState) {
    let server = Server::new(metrics_router(state.clone()), state, false);
    let _kill_on_drop = server.kill.clone().drop_guard();
    server.accept_all(&listener).await;
}

struct Server {
    app: Router,
    /// Whether connections begin with a handshake when there is a certificate.
    may_secure: bool,
    state: AppState,
    places: Arc<Semaphore>,
    connections: TaskTracker,
    /// Connections finish the response they are at.
    close: CancellationToken,
    /// Connections end at once.
    kill: CancellationToken,
}

impl Server {
    fn new(app: Router, state: AppState, may_secure: bool) -> Self {
        Server {
            app,
            may_secure,
            places: Arc::new(Semaphore::new(state.config().max_connections)),
            connections: TaskTracker::new(),
            close: CancellationToken::new(),
            kill: CancellationToken::new(),
            state,
        }
    }

    /// Never completes.
    async fn accept_all(&self, listener: &TcpListener) {
        loop {
            let place = self.places.clone().acquire_owned().await.expect("never closed: this is a bug");
            match listener.accept().await {
                Ok((stream, peer)) => self.start(stream, peer, place),
                // The client was gone before it was looked at.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn start(&self, stream: TcpStream, peer: SocketAddr, place: OwnedSemaphorePermit) {
        let config = self.state.config();
        // Events of a stream are small and must not wait for one another.
        let _ = stream.set_nodelay(true);
        let mut stream = TimeoutWriter::new(stream);
        stream.set_timeout(Some(config.write_stall_timeout));
        let stream = Box::pin(stream);
        let tls = self.state.access().tls.clone().filter(|_| self.may_secure);
        let (state, app) = (self.state.clone(), self.app.clone());
        let (close, kill) = (self.close.clone(), self.kill.clone());
        let connection = async move {
            let Some(tls) = tls else { return serve(stream, state, app, close).await };
            let stream = tokio::select! {
                stream = tls::accept(tls, stream, state.config().header_read_timeout) => stream?,
                () = close.cancelled() => return Ok(()),
            };
            serve(stream, state, app, close).await
        };
        self.connections.spawn(async move {
            let _place = place;
            tokio::select! {
                result = connection => if let Err(error) = result {
                    tracing::debug!(%peer, %error, "connection ended early");
                },
                () = kill.cancelled() => {}
            }
        });
    }

    /// Completes when running requests are over or out of time.
    async fn drain_after(&self, shutdown: impl Future<Output = ()>) {
        shutdown.await;
        let drain = self.state.drain();
        let delay = self.state.config().drain_delay;
        if !delay.is_zero() {
            drain.announce();
            tokio::time::sleep(delay).await;
        }
        drain.begin();
        let timeout = self.state.config().drain_timeout;
        if tokio::time::timeout(timeout, drain.idle()).await.is_err() {
            tracing::warn!(
                seconds = timeout.as_secs(),
                "the drain timeout passed; cutting running requests off"
            );
            drain.cut_off();
        }
    }

    async fn close_all(&self) {
        self.close.cancel();
        self.connections.close();
        if tokio::time::timeout(CLOSING_TIME, self.connections.wait()).await.is_err() {
            self.kill.cancel();
            self.connections.wait().await;
        }
    }
}

/// One connection from its first to its last request.
async fn serve(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    state: AppState,
    app: Router,
    close: CancellationToken,
) -> io::Result<()> {
    let header_read_timeout = state.config().header_read_timeout;
    let service = service_fn(move |request| {
        let (state, reply) = (state.clone(), app.clone().oneshot(request));
        Box::pin(async move {
            let mut response = reply.await?;
            if state.drain().is_announced() {
                // Balancers keep connections: the next request should not come by this one.
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, Infallible>(response)
        })
    });
    let mut connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(header_read_timeout)
        .serve_connection(TokioIo::new(stream), service);
    let ended = tokio::select! {
        result = poll_fn(|cx| connection.poll_without_shutdown(cx)) => Some(result),
        () = close.cancelled() => None,
    };
    let ended = match ended {
        Some(result) => result,
        None => {
            Pin::new(&mut connection).graceful_shutdown();
            poll_fn(|cx| connection.poll_without_shutdown(cx)).await
        }
    };
    ended.map_err(io::Error::other)?;
    linger(connection.into_parts().io.into_inner()).await;
    Ok(())
}

/// Says that nothing more will come, then reads on for a while: closing a socket with unread bytes in it makes the
/// kernel throw away a response (413, 429…) that the client, still sending its body, has not read yet.
async fn linger(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    let read_on = async {
        stream.shutdown().await?;
        tokio::io::copy(&mut stream, &mut tokio::io::sink()).await
    };
    // Whatever happens now, the connection is over.
    let _ = tokio::time::timeout(CLOSING_TIME, read_on).await;
}
