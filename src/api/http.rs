//! The HTTP of the control API: a table of calls, from which both router and OpenAPI document come, and the server.
//!
//! A call is a plain function that may wait. It runs on a thread of its own, so that neither a slow one nor a slow
//! client keeps others waiting, and no thread of the machine ever waits for a client.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::Request as HttpRequest;
use axum::http::header::{CONTENT_TYPE, SERVER};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodFilter, on};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use utoipa::ToSchema;
use utoipa::openapi::path::{OperationBuilder, ParameterBuilder, ParameterIn};
use utoipa::openapi::request_body::RequestBodyBuilder;
use utoipa::openapi::{
    ComponentsBuilder, ContentBuilder, HttpMethod, InfoBuilder, OpenApi, OpenApiBuilder, Paths, Ref, RefOr,
    Required, ResponseBuilder, Schema, schema::ObjectBuilder, schema::Type,
};

use super::firecracker::types::Fault;

/// Connections that are served at a time; more wait. Each has a thread if its call waits, so that no other waits for one.
pub const MAX_CONNECTIONS: usize = 512;
/// How long a client may take for the head of a request (and stay silent between two), and for its body.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long clients may take, at the end of the program, for the rest of their answers.
pub const LAST_WORDS: Duration = Duration::from_millis(250);
/// Largest body of a request in bytes, as Firecracker has it, unless `--http-api-max-payload-size` says otherwise.
pub const MAX_BODY: usize = 51_200;

/// A request that was not carried out: a sentence for the client, with status 400.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal(pub String);

impl<E: std::fmt::Display> From<E> for Refusal {
    fn from(error: E) -> Self {
        Self(error.to_string())
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let fault = Fault { fault_message: self.0 };
        json(StatusCode::BAD_REQUEST, &fault)
    }
}

fn json(status: StatusCode, body: &impl Serialize) -> Response {
    match serde_json::to_vec(body) {
        Ok(bytes) => (status, [(CONTENT_TYPE, "application/json")], bytes).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// What a call takes or gives.
#[derive(Debug)]
pub struct Json<T>(pub T);

/// What the body of a request becomes.
pub trait Input: Sized + Send + 'static {
    /// Its description, if there is a body.
    fn schema(components: &mut Schemas) -> Option<RefOr<Schema>>;
    /// Reads it; an error is a sentence.
    fn parse(body: &[u8]) -> Result<Self, String>;
}

/// What becomes the body of an answer.
pub trait Output: Send + 'static {
    /// Its description, if there is a body.
    fn schema(components: &mut Schemas) -> Option<RefOr<Schema>>;
    /// Writes it.
    fn respond(self) -> Response;
}

/// Named schemas of the document.
pub type Schemas = Vec<(String, RefOr<Schema>)>;

fn named<T: ToSchema>(components: &mut Schemas) -> Option<RefOr<Schema>> {
    components.push((T::name().into_owned(), T::schema()));
    T::schemas(components);
    Some(Ref::from_schema_name(T::name()).into())
}

impl Input for () {
    fn schema(_: &mut Schemas) -> Option<RefOr<Schema>> {
        None
    }

    fn parse(body: &[u8]) -> Result<Self, String> {
        match body {
            [] => Ok(()),
            _ => Err("This request takes no body.".into()),
        }
    }
}

impl<T: DeserializeOwned + ToSchema + Send + 'static> Input for Json<T> {
    fn schema(components: &mut Schemas) -> Option<RefOr<Schema>> {
        named::<T>(components)
    }

    fn parse(body: &[u8]) -> Result<Self, String> {
        match body {
            [] => Err("This request takes a JSON body.".into()),
            body => super::strict::from_slice(body).map(Json).map_err(|error| {
                format!("An error occurred when deserializing the json body of a request: {error}.")
            }),
        }
    }
}

impl Output for () {
    fn schema(_: &mut Schemas) -> Option<RefOr<Schema>> {
        None
    }

    fn respond(self) -> Response {
        StatusCode::NO_CONTENT.into_response()
    }
}

impl<T: Serialize + ToSchema + Send + 'static> Output for Json<T> {
    fn schema(components: &mut Schemas) -> Option<RefOr<Schema>> {
        named::<T>(components)
    }

    fn respond(self) -> Response {
        json(StatusCode::OK, &self.0)
    }
}

/// A request to one of the calls.
#[derive(Debug)]
pub struct Request<I> {
    /// What stands for `{id}` in the path; empty when nothing does.
    pub id: String,
    /// The body.
    pub body: I,
}

/// The calls of the API on a `C`.
pub struct Calls<C> {
    control: Arc<C>,
    max_body: usize,
    router: Router,
    /// Calls are described as well: nobody who is served needs it, and it takes time.
    described: bool,
    paths: Paths,
    schemas: Schemas,
}

impl<C: Send + Sync + 'static> Calls<C> {
    /// No calls yet; bodies of requests have at most `max_body` bytes.
    pub fn on(control: Arc<C>, max_body: usize) -> Self {
        let schemas = vec![(Fault::name().into_owned(), <Fault as utoipa::PartialSchema>::schema())];
        Self { control, max_body, router: Router::new(), described: false, paths: Paths::new(), schemas }
    }

    /// The same, with a description of each call that is added.
    pub fn described(self) -> Self {
        Self { described: true, ..self }
    }

    /// Adds the call `method path`. `what`: one line for the document.
    pub fn call<I: Input, O: Output>(
        mut self,
        method: HttpMethod,
        path: &str,
        what: &str,
        work: fn(&C, Request<I>) -> Result<O, Refusal>,
    ) -> Self {
        let (control, max_body) = (self.control.clone(), self.max_body);
        let has_id = path.contains("{id}");
        let handler = move |request: HttpRequest| async move {
            let id = match has_id {
                true => last_segment(request.uri().path())?,
                false => String::new(),
            };
            let body = read_body(request.into_body(), max_body).await?;
            let body = I::parse(&body).map_err(Refusal)?;
            let done = tokio::task::spawn_blocking(move || work(&control, Request { id, body })).await;
            done.map_err(|_| Refusal("The request failed because of a bug.".into()))?.map(Output::respond)
        };
        self.router = self.router.route(path, on(filter(&method), handler));
        self.document::<I, O>(method, path, what)
    }

    /// Adds a call that answers with more than JSON: it is not in the table's form, but in the document.
    pub fn raw(mut self, path: &str, what: &str, content: &str, route: axum::routing::MethodRouter) -> Self {
        self.router = self.router.route(path, route);
        if !self.described {
            return self;
        }
        let text = ContentBuilder::new().schema(Some(ObjectBuilder::new().schema_type(Type::String))).build();
        let answer = ResponseBuilder::new().description("as described").content(content, text);
        let operation = OperationBuilder::new().summary(Some(what)).response("200", answer);
        let operation = operation.response("400", refused());
        self.paths.add_path_operation(path, vec![HttpMethod::Get], operation);
        self
    }

    /// Adds a call after which the connection speaks `protocol`.
    pub fn upgrade(
        mut self,
        path: &str,
        what: &str,
        protocol: &str,
        route: axum::routing::MethodRouter,
    ) -> Self {
        self.router = self.router.route(path, route);
        if self.described {
            let answer = ResponseBuilder::new().description(format!("the connection speaks {protocol}"));
            let operation = OperationBuilder::new().summary(Some(what)).response("101", answer);
            let operation = operation.response("400", refused());
            self.paths.add_path_operation(path, vec![HttpMethod::Get], operation);
        }
        self
    }

    fn document<I: Input, O: Output>(mut self, method: HttpMethod, path: &str, what: &str) -> Self {
        if !self.described {
            return self;
        }
        let mut operation = OperationBuilder::new().summary(Some(what));
        if path.contains("{id}") {
            let schema =
                ObjectBuilder::new().schema_type(Type::String).pattern(Some("^[A-Za-z0-9_-]{1,64}$"));
            let id =
                ParameterBuilder::new().name("id").parameter_in(ParameterIn::Path).required(Required::True);
            operation = operation.parameter(id.schema(Some(schema)));
        }
        if let Some(schema) = I::schema(&mut self.schemas) {
            let content = ContentBuilder::new().schema(Some(schema)).build();
            let body =
                RequestBodyBuilder::new().content("application/json", content).required(Some(Required::True));
            operation = operation.request_body(Some(body.build()));
        }
        let good = ResponseBuilder::new();
        operation = match O::schema(&mut self.schemas) {
            None => operation.response("204", good.description("done")),
            Some(schema) => {
                let content = ContentBuilder::new().schema(Some(schema)).build();
                operation.response("200", good.description("the answer").content("application/json", content))
            }
        };
        operation = operation.response("400", refused());
        self.paths.add_path_operation(path, vec![method], operation);
        self
    }

    /// What the calls are on.
    pub fn control(&self) -> &Arc<C> {
        &self.control
    }

    /// The description of all calls.
    pub fn open_api(&self, title: &str) -> OpenApi {
        let components = self
            .schemas
            .iter()
            .cloned()
            .fold(ComponentsBuilder::new(), |components, (name, schema)| components.schema(name, schema));
        let info = InfoBuilder::new().title(title).version(env!("CARGO_PKG_VERSION"));
        OpenApiBuilder::new()
            .info(info)
            .paths(self.paths.clone())
            .components(Some(components.build()))
            .build()
    }

    /// The router of all calls. What is none of them is refused as everything else is; `missing` says of a method and a
    /// path what is not there yet, if it is something that somebody can expect.
    pub fn router(self, missing: fn(&str, &str) -> Option<&'static str>) -> Router {
        let unknown = move |request: HttpRequest| async move {
            let (method, path) = (request.method(), request.uri().path());
            Refusal(match missing(method.as_str(), path) {
                Some(what) => format!("{method} {path}: {what} not supported yet."),
                None => format!("Invalid request method and/or path: {method} {path}."),
            })
        };
        let named = axum::middleware::map_response(|mut response: Response| async {
            response.headers_mut().insert(SERVER, HeaderValue::from_static("vmm"));
            response
        });
        self.router.fallback(unknown).method_not_allowed_fallback(unknown).layer(named)
    }
}

fn refused() -> ResponseBuilder {
    let fault = ContentBuilder::new().schema(Some(Ref::from_schema_name("Fault"))).build();
    ResponseBuilder::new().description("refused, and nothing was changed").content("application/json", fault)
}

fn filter(method: &HttpMethod) -> MethodFilter {
    match method {
        HttpMethod::Put => MethodFilter::PUT,
        HttpMethod::Patch => MethodFilter::PATCH,
        HttpMethod::Post => MethodFilter::POST,
        HttpMethod::Delete => MethodFilter::DELETE,
        _ => MethodFilter::GET,
    }
}

/// The `{id}` of a path, which is always its last part.
fn last_segment(path: &str) -> Result<String, Refusal> {
    let id = path.rsplit('/').next().unwrap_or_default();
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-');
    match (1..=64).contains(&id.len()) && id.bytes().all(allowed) {
        true => Ok(id.into()),
        false => Err(Refusal(format!("'{id}' is no ID; use up to 64 letters, digits, '_' and '-'."))),
    }
}

async fn read_body(body: Body, max: usize) -> Result<Bytes, Refusal> {
    match tokio::time::timeout(PATIENCE, to_bytes(body, max)).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(_)) => {
            Err(Refusal(format!("The body of the request is larger than {max} bytes, or was cut off.")))
        }
        Err(_) => Err(Refusal("The body of the request did not come in time.".into())),
    }
}

/// Serves `router` until `end`; then each client still gets the rest of the answer that is on its way to it, but nobody
/// is waited for longer than [`LAST_WORDS`].
pub async fn serve(listeners: Vec<UnixListener>, router: Router, end: impl Future) {
    let ending = watch::Sender::new(());
    first(async { _ = end.await }, accept(&listeners, router, &ending)).await;
    ending.send_replace(());
    // Each connection has a receiver. Who has not read it all by then is left behind.
    _ = tokio::time::timeout(LAST_WORDS, ending.closed()).await;
}

/// Does both until the first of them is done.
pub async fn first(one: impl Future<Output = ()>, other: impl Future<Output = ()>) {
    let (mut one, mut other) = (pin!(one), pin!(other));
    poll_fn(|context| match one.as_mut().poll(context) {
        Poll::Ready(()) => Poll::Ready(()),
        Poll::Pending => other.as_mut().poll(context),
    })
    .await;
}

/// The next connection to any of them.
async fn next(listeners: &[UnixListener]) -> std::io::Result<UnixStream> {
    let accepted = |context: &mut Context<'_>| {
        let mut all = listeners.iter().map(|listener| listener.poll_accept(context));
        all.find(Poll::is_ready).unwrap_or(Poll::Pending)
    };
    Ok(poll_fn(accepted).await?.0)
}

/// Takes connections for ever. Clients that come while too many are served wait for their turn.
async fn accept(listeners: &[UnixListener], router: Router, ending: &watch::Sender<()>) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        // The semaphore is never closed.
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let stream = match next(listeners).await {
            Ok(stream) => stream,
            Err(error) => {
                // Out of descriptors, most likely: others may give some back.
                tracing::warn!(%error, "cannot take a connection of the API");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (router, ending) = (router.clone(), ending.subscribe());
        tokio::spawn(async move {
            // A client that breaks off, or speaks no HTTP, is its own matter.
            if let Err(error) = converse(stream, router, ending).await {
                tracing::debug!(%error, "a connection of the API ended");
            }
            drop(place);
        });
    }
}

/// Answers the requests of one client: all that come, and once `ending` has changed, the one that is being answered.
async fn converse(
    stream: UnixStream,
    router: Router,
    mut ending: watch::Receiver<()>,
) -> Result<(), hyper::Error> {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(PATIENCE).max_buf_size(64 << 10);
    // Who ends its side after the request, as netcat does, still reads.
    http.half_close(true);
    let service = TowerToHyperService::new(router);
    let mut connection = pin!(http.serve_connection(TokioIo::new(stream), service).with_upgrades());
    let mut end = pin!(ending.changed());
    let mut told = false;
    let step = |context: &mut Context<'_>| {
        if !told && end.as_mut().poll(context).is_ready() {
            told = true;
            connection.as_mut().graceful_shutdown();
        }
        connection.as_mut().poll(context)
    };
    poll_fn(step).await
}
