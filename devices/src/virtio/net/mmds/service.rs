//! What a guest asks the metadata service, and the answers: Firecracker's MMDS, which is like EC2's IMDS.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use rustix::rand::{GetRandomFlags, getrandom};
use serde_json::{Map, Value};

use super::config::{Metadata, Version};

/// Longest request in bytes, body included.
pub const MAX_REQUEST: usize = 8 << 10;
/// Most headers of a request.
const MAX_HEADERS: usize = 64;
/// Where tokens come from.
const TOKEN_PATH: &str = "/latest/api/token";
/// Headers that carry a token, ours and EC2's.
const TOKEN: [&str; 2] = ["X-metadata-token", "X-aws-ec2-metadata-token"];
/// Headers that say how many seconds a token is to be good, ours and EC2's.
const TTL: [&str; 2] = ["X-metadata-token-ttl-seconds", "X-aws-ec2-metadata-token-ttl-seconds"];
/// Seconds that a token can be good.
const TTL_RANGE: std::ops::RangeInclusive<u64> = 1..=21600;
/// Most tokens that are good at a time; one more ends the oldest.
const MAX_TOKENS: usize = 1024;
/// Bytes of chance in a token.
const TOKEN_BYTES: usize = 24;

/// Answers requests for metadata.
#[derive(Debug)]
pub struct Service {
    pub metadata: Metadata,
    /// Tokens and their ends, the oldest first.
    tokens: VecDeque<([u8; TOKEN_BYTES], Instant)>,
}

/// What is sent back.
#[derive(Debug, PartialEq, Eq)]
pub struct Reply {
    /// All of it.
    pub bytes: Vec<u8>,
    /// It is the last one.
    pub close: bool,
}

/// An answer before it is written down.
struct Answer {
    status: &'static str,
    body: String,
    json: bool,
    /// More headers.
    more: String,
}

impl Answer {
    fn text(status: &'static str, body: impl Into<String>) -> Self {
        Self { status, body: body.into(), json: false, more: String::new() }
    }

    fn bad(body: impl Into<String>) -> Self {
        Self::text("400 Bad Request", body)
    }

    fn reply(self, close: bool) -> Reply {
        let Self { status, body, json, more } = self;
        let kind = if json { "application/json" } else { "text/plain" };
        let connection = if close { "close" } else { "keep-alive" };
        let len = body.len();
        let text = format!(
            "HTTP/1.1 {status}\r\nServer: vmm\r\nConnection: {connection}\r\nContent-Type: {kind}\r\n{more}Content-Length: {len}\r\n\r\n{body}"
        );
        Reply { bytes: text.into_bytes(), close }
    }
}

/// A request's headers, as far as they are looked at.
struct Headers<'h>(&'h [httparse::Header<'h>]);

impl<'h> Headers<'h> {
    fn get(&self, name: &str) -> Option<&'h str> {
        let header = self.0.iter().find(|header| header.name.eq_ignore_ascii_case(name))?;
        Some(std::str::from_utf8(header.value).unwrap_or_default().trim())
    }

    /// The first of these that is there, with its name.
    fn either(&self, names: [&'static str; 2]) -> Option<(&'static str, &'h str)> {
        names.into_iter().find_map(|name| Some((name, self.get(name)?)))
    }

    fn mentions(&self, name: &str, word: &str) -> bool {
        self.get(name).is_some_and(|value| value.to_ascii_lowercase().contains(word))
    }
}

impl Service {
    pub fn new(metadata: Metadata) -> Self {
        Self { metadata, tokens: VecDeque::new() }
    }

    /// Answers the request that `input` begins with; also says how long that is. `None`: it goes on.
    pub fn answer(&mut self, input: &[u8]) -> Option<(usize, Reply)> {
        let refuse = |why: &str| Some((input.len(), Answer::bad(why).reply(true)));
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut request = httparse::Request::new(&mut headers);
        let head = match request.parse(input) {
            Ok(httparse::Status::Complete(head)) => head,
            Ok(httparse::Status::Partial) if input.len() < MAX_REQUEST => return None,
            Ok(httparse::Status::Partial) => return refuse("The request is too long."),
            Err(_) => return refuse("The request is malformed."),
        };
        let (method, path) = (request.method.unwrap_or_default(), request.path.unwrap_or_default());
        let old = request.version == Some(0);
        let headers = Headers(request.headers);
        if headers.get("Transfer-Encoding").is_some() {
            let answer = Answer::text("501 Not Implemented", "Give the body's length, or no body.");
            return Some((input.len(), answer.reply(true)));
        }
        let body = match headers.get("Content-Length").map(str::parse::<usize>) {
            None => 0,
            Some(Ok(len)) if len <= MAX_REQUEST - head => len,
            Some(_) => return refuse("The body is too long."),
        };
        if input.len() < head + body {
            return None;
        }
        let close =
            headers.mentions("Connection", "close") || old && !headers.mentions("Connection", "keep-alive");
        Some((head + body, self.respond(method, path, &headers).reply(close)))
    }

    fn respond(&mut self, method: &str, target: &str, headers: &Headers<'_>) -> Answer {
        let path = path_of(target);
        match method {
            "GET" => match self.permitted(headers) {
                Ok(()) => self.look_up(&path, headers),
                Err(answer) => answer,
            },
            "PUT" => self.give_token(&path, headers).unwrap_or_else(|answer| answer),
            _ => Answer {
                more: "Allow: GET, PUT\r\n".into(),
                ..Answer::text("405 Method Not Allowed", "Not allowed HTTP method.")
            },
        }
    }

    /// Whether the request has the token that it needs.
    fn permitted(&self, headers: &Headers<'_>) -> Result<(), Answer> {
        let unauthorized = |why: &str| Err(Answer::text("401 Unauthorized", why));
        match (self.metadata.version, headers.either(TOKEN)) {
            (Version::V1, _) => Ok(()),
            (Version::V2, Some((_, token))) if self.is_good(token) => Ok(()),
            (Version::V2, Some(_)) => unauthorized("MMDS token not valid."),
            (Version::V2, None) => {
                let [ours, ec2] = TOKEN;
                unauthorized(&format!("No token is given: use the header `{ours}` or `{ec2}`."))
            }
        }
    }

    fn is_good(&self, token: &str) -> bool {
        let now = Instant::now();
        self.tokens.iter().any(|(good, end)| *end > now && hex(good) == token)
    }

    fn give_token(&mut self, path: &str, headers: &Headers<'_>) -> Result<Answer, Answer> {
        // Who forwards for others does not know that it must not forward this.
        if headers.get("X-Forwarded-For").is_some() {
            return Err(Answer::bad("The header X-Forwarded-For is not allowed."));
        }
        if path != TOKEN_PATH {
            return Err(not_found(path));
        }
        let Some((name, value)) = headers.either(TTL) else {
            let [ours, ec2] = TTL;
            let why = format!("No lifetime of the token is given: use the header `{ours}` or `{ec2}`.");
            return Err(Answer::bad(why));
        };
        let Some(seconds) = value.parse().ok().filter(|seconds| TTL_RANGE.contains(seconds)) else {
            let (first, last) = (TTL_RANGE.start(), TTL_RANGE.end());
            return Err(Answer::bad(format!("'{value}' is no lifetime of a token; give {first} to {last}.")));
        };
        let mut token = [0; TOKEN_BYTES];
        if !matches!(getrandom(&mut token[..], GetRandomFlags::empty()), Ok(TOKEN_BYTES)) {
            return Err(Answer::text("500 Internal Server Error", "There are no random numbers."));
        }
        let now = Instant::now();
        self.tokens.retain(|(_, end)| *end > now);
        if self.tokens.len() == MAX_TOKENS {
            self.tokens.pop_front();
        }
        self.tokens.push_back((token, now + Duration::from_secs(seconds)));
        Ok(Answer { more: format!("{name}: {seconds}\r\n"), ..Answer::text("200 OK", hex(&token)) })
    }

    fn look_up(&self, path: &str, headers: &Headers<'_>) -> Answer {
        let Some(found) = Found::at(&self.metadata.data, path) else { return not_found(path) };
        if headers.mentions("Accept", "application/json") && !self.metadata.imds_compat {
            return Answer { json: true, ..Answer::text("200 OK", found.json()) };
        }
        match found {
            Found::Map(map) => Answer::text("200 OK", listing(map)),
            Found::Value(Value::String(text)) => Answer::text("200 OK", text),
            Found::Value(_) => Answer::text(
                "501 Not Implemented",
                "Cannot retrieve value. The value has an unsupported type: ask for JSON.",
            ),
        }
    }
}

/// What is at a path.
enum Found<'a> {
    Map(&'a Map<String, Value>),
    Value(&'a Value),
}

impl<'a> Found<'a> {
    /// Follows `path`, a JSON pointer (RFC 6901).
    fn at(data: &'a Map<String, Value>, path: &str) -> Option<Self> {
        let Some((_, path)) = path.split_once('/') else { return Some(Self::Map(data)) };
        let (first, rest) = path.split_at(path.find('/').unwrap_or(path.len()));
        let value = data.get(&first.replace("~1", "/").replace("~0", "~"))?.pointer(rest)?;
        Some(match value {
            Value::Object(map) => Self::Map(map),
            value => Self::Value(value),
        })
    }

    fn json(&self) -> String {
        let text = match self {
            Self::Map(map) => serde_json::to_string(map),
            Self::Value(value) => serde_json::to_string(value),
        };
        // What was read from JSON can be written.
        text.unwrap_or_default()
    }
}

/// The keys, and which of them have keys of their own.
fn listing(map: &Map<String, Value>) -> String {
    let line = |(key, value): (&String, &Value)| format!("{key}{}", if value.is_object() { "/" } else { "" });
    map.iter().map(line).collect::<Vec<_>>().join("\n")
}

fn not_found(path: &str) -> Answer {
    Answer::text("404 Not Found", format!("Resource not found: {path}."))
}

/// The path of a request's target, which may be a whole URL: single slashes, none at the end, no query.
fn path_of(target: &str) -> String {
    let path = match target.split_once("://") {
        Some((_, rest)) if !target.starts_with('/') => rest.find('/').map_or("", |at| &rest[at..]),
        _ => target,
    };
    let path = path.split('?').next().unwrap_or_default();
    path.split('/').filter(|part| !part.is_empty()).map(|part| format!("/{part}")).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
#[path = "service_tests.rs"]
mod tests;
