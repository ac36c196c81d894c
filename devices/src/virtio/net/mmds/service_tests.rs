//! Requests and their answers, as text.

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn service(version: Version) -> Service {
    let data = json!({
        "latest": {
            "meta-data": {"ami-id": "ami-1", "a/b": "slash", "count": 3, "list": ["x", {"y": "z"}], "none": null},
            "empty": {}
        }
    });
    let Value::Object(data) = data else { panic!("an object") };
    Service::new(Metadata { data, version, ..Metadata::default() })
}

/// Status and body of the answer to a request with these lines.
fn ask(service: &mut Service, lines: &[&str]) -> (u16, String) {
    let request = format!("{}\r\n\r\n", lines.join("\r\n"));
    let (used, reply) = service.answer(request.as_bytes()).expect("a whole request");
    assert!(used == request.len() || reply.close, "{request}");
    let text = String::from_utf8(reply.bytes).expect("text");
    let (head, body) = text.split_once("\r\n\r\n").expect("a head");
    assert!(head.contains(&format!("Content-Length: {}", body.len())), "{head}");
    (head[9..12].parse().expect("a status"), body.to_owned())
}

#[test]
fn data_is_text_or_json_as_the_client_asks() {
    let service = &mut service(Version::V1);
    for (path, text, json) in [
        (
            "/",
            (200, "latest/"),
            r#"{"latest":{"empty":{},"meta-data":{"a/b":"slash","ami-id":"ami-1","count":3,"list":["x",{"y":"z"}],"none":null}}}"#,
        ),
        (
            "/latest",
            (200, "empty/\nmeta-data/"),
            r#"{"empty":{},"meta-data":{"a/b":"slash","ami-id":"ami-1","count":3,"list":["x",{"y":"z"}],"none":null}}"#,
        ),
        (
            "/latest/meta-data",
            (200, "a/b\nami-id\ncount\nlist\nnone"),
            r#"{"a/b":"slash","ami-id":"ami-1","count":3,"list":["x",{"y":"z"}],"none":null}"#,
        ),
        ("//latest///meta-data/ami-id//", (200, "ami-1"), r#""ami-1""#),
        ("http://169.254.169.254/latest/meta-data/ami-id?x=y", (200, "ami-1"), r#""ami-1""#),
        ("/latest/meta-data/a~1b", (200, "slash"), r#""slash""#),
        ("/latest/meta-data/list/1/y", (200, "z"), r#""z""#),
        ("/latest/empty", (200, ""), "{}"),
    ] {
        let get = format!("GET {path} HTTP/1.1");
        assert_eq!(ask(service, &[&get]), (text.0, text.1.to_owned()), "{path}");
        assert_eq!(ask(service, &[&get, "Accept: text/plain"]), (text.0, text.1.to_owned()), "{path}");
        assert_eq!(ask(service, &[&get, "accept: application/json"]), (200, json.to_owned()), "{path}");
        service.metadata.imds_compat = true;
        assert_eq!(ask(service, &[&get, "Accept: application/json"]), (text.0, text.1.to_owned()), "{path}");
        service.metadata.imds_compat = false;
    }
    for path in ["/latest/meta-data/count", "/latest/meta-data/list", "/latest/meta-data/none"] {
        assert_eq!(ask(service, &[&format!("GET {path} HTTP/1.1")]).0, 501, "{path} has no text form");
        assert_eq!(ask(service, &[&format!("GET {path} HTTP/1.1"), "Accept: application/json"]).0, 200);
    }
    for path in ["/x", "/latest/meta-data/ami-id/x", "/latest/meta-data/list/2"] {
        let answer = ask(service, &[&format!("GET {path} HTTP/1.1")]);
        assert_eq!(answer, (404, format!("Resource not found: {path}.")));
    }
}

#[test]
fn a_token_is_needed_exactly_with_version_2() {
    for (version, without) in [(Version::V1, 200), (Version::V2, 401)] {
        let service = &mut service(version);
        let get = "GET /latest/meta-data/ami-id HTTP/1.1";
        assert_eq!(ask(service, &[get]).0, without);
        assert_eq!(ask(service, &[get, "X-metadata-token: wrong"]).0, without);
        let put = "PUT /latest/api/token HTTP/1.1";
        for names in [
            ["X-metadata-token-ttl-seconds", "X-metadata-token"],
            ["x-aws-ec2-metadata-token-ttl-seconds", "x-aws-ec2-metadata-token"],
        ] {
            let (status, token) = ask(service, &[put, &format!("{}: 21600", names[0])]);
            assert_eq!((status, token.len()), (200, 2 * TOKEN_BYTES));
            assert_eq!(ask(service, &[get, &format!("{}: {token}", names[1])]), (200, "ami-1".into()));
        }
        for lines in [
            &[put][..],
            &[put, "X-metadata-token-ttl-seconds: 0"],
            &[put, "X-metadata-token-ttl-seconds: 21601"],
            &[put, "X-metadata-token-ttl-seconds: soon"],
            &[put, "X-metadata-token-ttl-seconds: 9", "X-Forwarded-For: 10.0.0.1"],
        ] {
            assert_eq!(ask(service, lines).0, 400, "{lines:?}");
        }
        assert_eq!(ask(service, &["PUT /latest HTTP/1.1", "X-metadata-token-ttl-seconds: 9"]).0, 404);
        for method in ["POST", "DELETE", "HEAD", "PATCH"] {
            assert_eq!(ask(service, &[&format!("{method} / HTTP/1.1")]).0, 405);
        }
    }
}

#[test]
fn tokens_end_with_their_time_and_when_there_are_too_many() {
    let service = &mut service(Version::V2);
    let put = ["PUT /latest/api/token HTTP/1.1", "X-metadata-token-ttl-seconds: 60"];
    let first = ask(service, &put).1;
    assert!(service.is_good(&first));
    let more: Vec<_> = (0..MAX_TOKENS).map(|_| ask(service, &put).1).collect();
    assert!(!service.is_good(&first) && more.iter().all(|token| service.is_good(token)));
    service.tokens[0].1 = Instant::now();
    assert!(!service.is_good(&more[0]) && service.is_good(&more[1]));
    ask(service, &put);
    assert_eq!(service.tokens.len(), MAX_TOKENS, "those that have ended make room");
    assert!(service.is_good(&more[1]));
}

#[test]
fn a_request_is_as_long_as_it_says_and_no_longer_than_allowed() {
    let service = &mut service(Version::V1);
    assert_eq!(service.answer(b"GET / HTTP/1.1\r\nContent-Length: 3\r\n\r\nab"), None);
    let (used, reply) = service.answer(b"GET / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabcGET").expect("whole");
    assert!(used == 40 && !reply.close, "{used}");
    for lines in [
        &["GET / HTTP/1.1", "Content-Length: 8192"][..],
        &["GET / HTTP/1.1", "Content-Length: -1"],
        &["GET / HTTP/1.1", "Content-Length: 99999999999999999999"],
        &["GET /\u{7} HTTP/1.1"],
        &["GET / HTTP/3.1"],
        &["no request"],
    ] {
        assert_eq!(ask(service, lines).0, 400, "{lines:?}");
    }
    assert_eq!(ask(service, &["GET / HTTP/1.1", "Transfer-Encoding: chunked"]).0, 501);
    for (lines, close) in [
        (&["GET / HTTP/1.1"][..], false),
        (&["GET / HTTP/1.1", "Connection: Close"], true),
        (&["GET / HTTP/1.0"], true),
        (&["GET / HTTP/1.0", "Connection: keep-alive"], false),
    ] {
        let reply = service.answer(format!("{}\r\n\r\n", lines.join("\r\n")).as_bytes()).expect("whole").1;
        assert_eq!(reply.close, close, "{lines:?}");
    }
}

proptest! {
    #[test]
    fn any_bytes_are_answered_or_waited_for(bytes in prop::collection::vec(any::<u8>(), 0..2 * MAX_REQUEST), text in "[ -~\r\n]{0,200}") {
        for input in [&bytes[..bytes.len().min(MAX_REQUEST)], text.as_bytes()] {
            match service(Version::V2).answer(input) {
                Some((used, _)) => prop_assert!((1..=input.len().max(1)).contains(&used.max(1))),
                None => prop_assert!(input.len() < MAX_REQUEST),
            }
        }
    }
}
