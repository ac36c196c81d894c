//! The stack between a guest that means well and one that does not.

use proptest::prelude::*;
use serde_json::json;

use super::super::config::{ADDRESS, Metadata};
use super::super::guest_model::Guest;
use super::*;

fn service(data: serde_json::Value) -> Service {
    let serde_json::Value::Object(data) = data else { panic!("an object") };
    Service::new(Metadata { data, ..Metadata::default() })
}

/// A guest at the service's wire.
struct Pair {
    guest: Guest,
    stack: Stack,
    service: Service,
}

impl Pair {
    fn new(data: serde_json::Value) -> Self {
        Self { guest: Guest::new(1), stack: Stack::new(ADDRESS, 1500, 7), service: service(data) }
    }

    /// Moves packets until there are no more.
    fn exchange(&mut self) {
        loop {
            self.guest.poll();
            let sent: Vec<_> = self.guest.packets.outgoing.drain(..).collect();
            if sent.is_empty() && self.stack.next_packet().is_none() {
                return;
            }
            for packet in sent {
                self.stack.take(packet, &mut self.service);
                self.bounded();
            }
            while let Some(packet) = self.stack.next_packet() {
                self.guest.packets.incoming.push_back(packet.to_vec());
                self.stack.packet_taken();
            }
        }
    }

    /// Whatever the guest did.
    fn bounded(&self) {
        let Stack { wire, connections, sockets, .. } = &self.stack;
        assert!(connections.len() <= MAX_CONNECTIONS && sockets.iter().count() == connections.len());
        // What is answered at once, a packet each, comes on top.
        assert!(wire.outgoing.len() <= MAX_WAITING + 1 && wire.incoming.is_none());
    }

    fn ask(&mut self, handle: SocketHandle, request: &str) -> String {
        self.guest.socket(handle).send_slice(request.as_bytes()).expect("an open connection");
        let mut answer = String::new();
        loop {
            self.exchange();
            match self.guest.read(handle) {
                more if more.is_empty() => return answer,
                more => answer += &more,
            }
        }
    }
}

const GET: &str = "GET /a HTTP/1.1\r\nHost: x\r\n\r\n";

#[test]
fn requests_of_one_connection_are_answered_in_turn() {
    let mut pair = Pair::new(json!({"a": "first", "b": {"c": "second"}}));
    let connection = pair.guest.connect(ADDRESS);
    pair.exchange();
    let answers = pair.ask(connection, &format!("{GET}GET /b HTTP/1.1\r\n\r\nGET /b/c HTT"));
    let bodies: Vec<_> = answers.split("HTTP/1.1 200 OK").map(|text| text.lines().last()).collect();
    assert_eq!(bodies[1..], [Some("first"), Some("c")]);
    assert!(pair.ask(connection, "P/1.0\r\n\r\n").ends_with("\r\n\r\nsecond"));
    pair.exchange();
    assert!(!pair.guest.socket(connection).may_recv(), "HTTP/1.0 has one request a connection");
    assert_eq!(pair.ask_new(GET).lines().last(), Some("first"));
}

impl Pair {
    fn ask_new(&mut self, request: &str) -> String {
        let connection = self.guest.connect(ADDRESS);
        self.exchange();
        self.ask(connection, request)
    }
}

#[test]
fn an_answer_larger_than_all_buffers_arrives_whole() {
    let text = "0123456789".repeat(50_000);
    let mut pair = Pair::new(json!({"a": text}));
    let answer = pair.ask_new(GET);
    assert!(answer.ends_with(&text) && answer.contains("Content-Length: 500000\r\n"));
}

#[test]
fn a_request_longer_than_any_is_refused_and_ends_its_connection() {
    let mut pair = Pair::new(json!({}));
    let connection = pair.guest.connect(ADDRESS);
    pair.exchange();
    let answer = pair.ask(connection, &format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(2 * MAX_REQUEST)));
    assert!(answer.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{answer}");
    pair.exchange();
    assert!(!pair.guest.socket(connection).may_recv());
}

#[test]
fn with_too_many_connections_the_quietest_gives_way() {
    let mut pair = Pair::new(json!({"a": "x"}));
    let connections: Vec<_> = (0..3 * MAX_CONNECTIONS)
        .map(|_| {
            let connection = pair.guest.connect(ADDRESS);
            pair.exchange();
            connection
        })
        .collect();
    let open = |pair: &mut Pair, at: usize| pair.guest.socket(connections[at]).may_send();
    assert!(!open(&mut pair, 0) && open(&mut pair, 3 * MAX_CONNECTIONS - 1));
    assert_eq!((0..connections.len()).filter(|&at| open(&mut pair, at)).count(), MAX_CONNECTIONS);
    assert!(pair.ask(connections[2 * MAX_CONNECTIONS], GET).ends_with("\r\n\r\nx"));
}

#[test]
fn a_guest_that_closes_first_gets_its_answer_and_leaves_nothing() {
    let mut pair = Pair::new(json!({"a": "x"}));
    let connection = pair.guest.connect(ADDRESS);
    pair.exchange();
    pair.guest.socket(connection).send_slice(GET.as_bytes()).expect("open");
    pair.guest.socket(connection).close();
    pair.exchange();
    assert!(pair.guest.read(connection).ends_with("\r\n\r\nx"));
    pair.exchange();
    assert_eq!(pair.stack.connections.len(), 0);
    assert_eq!(pair.stack.due_in(), None, "nothing is waited for");
}

#[test]
fn a_guest_that_takes_no_packets_is_sent_no_more() {
    let mut pair = Pair::new(json!({"a": "y".repeat(100_000)}));
    for seed in 0..100 {
        let mut guest = Guest::new(seed);
        guest.connect(ADDRESS);
        guest.poll();
        for packet in guest.packets.outgoing.drain(..) {
            // Its source address decides which connection it belongs to.
            let mut packet = packet.clone();
            packet[15] = seed as u8 + 3;
            for _ in 0..10 {
                pair.stack.take(packet.clone(), &mut pair.service);
                pair.bounded();
            }
        }
    }
    assert!(pair.stack.next_packet().is_some());
}

/// What a guest does.
#[derive(Clone, Debug)]
enum Step {
    Connect,
    Write {
        at: usize,
        text: String,
    },
    Close {
        at: usize,
    },
    Abort {
        at: usize,
    },
    Exchange,
    /// A packet of the guest's, with some of its bytes changed.
    Damaged {
        changes: Vec<(usize, u8)>,
        cut: usize,
    },
    /// Any packet at all.
    Any(Vec<u8>),
    Time,
}

fn any_step() -> impl Strategy<Value = Step> {
    let at = 0..8usize;
    let text = prop_oneof![
        Just(GET.to_owned()),
        Just("PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\n\r\n".to_owned()),
        "[ -~\r\n]{0,300}",
        "(GET|PUT|POST|X) [a-z/~01%?]{0,20} HTTP/1\\.[0-9]\r\n([A-Za-z-]{1,20}: [ -~]{0,20}\r\n){0,5}\r\n",
    ];
    let change = (0..80usize, any::<u8>());
    prop_oneof![
        3 => Just(Step::Connect),
        6 => (at.clone(), text).prop_map(|(at, text)| Step::Write { at, text }),
        1 => at.clone().prop_map(|at| Step::Close { at }),
        1 => at.prop_map(|at| Step::Abort { at }),
        4 => Just(Step::Exchange),
        6 => (prop::collection::vec(change, 1..4), 0..200usize)
            .prop_map(|(changes, cut)| Step::Damaged { changes, cut }),
        2 => prop::collection::vec(any::<u8>(), 0..120).prop_map(Step::Any),
        1 => Just(Step::Time),
    ]
}

proptest! {
    #[test]
    fn whatever_a_guest_sends_the_stack_keeps_within_its_bounds_and_goes_on(
        steps in prop::collection::vec(any_step(), 1..120),
    ) {
        let mut pair = Pair::new(json!({"a": "x".repeat(3000)}));
        let mut connections = Vec::new();
        for step in steps {
            match step {
                Step::Connect => connections.push(pair.guest.connect(ADDRESS)),
                Step::Write { at, text } => {
                    if let Some(&connection) = connections.iter().rev().nth(at) {
                        _ = pair.guest.socket(connection).send_slice(text.as_bytes());
                    }
                }
                Step::Close { at } => {
                    connections.iter().rev().nth(at).into_iter().for_each(|&c| pair.guest.socket(c).close());
                }
                Step::Abort { at } => {
                    connections.iter().rev().nth(at).into_iter().for_each(|&c| pair.guest.socket(c).abort());
                }
                Step::Exchange => pair.exchange(),
                Step::Damaged { changes, cut } => {
                    pair.guest.poll();
                    for mut packet in pair.guest.packets.outgoing.drain(..) {
                        for &(at, value) in &changes {
                            let len = packet.len();
                            packet[at % len] = value;
                        }
                        packet.truncate(20.max(cut));
                        // The device lets nothing else through.
                        packet[16..20].copy_from_slice(&ADDRESS.octets());
                        pair.stack.take(packet, &mut pair.service);
                    }
                }
                Step::Any(packet) => _ = pair.stack.take(packet, &mut pair.service),
                Step::Time => {
                    pair.stack.due_in();
                    pair.stack.go_on(&mut pair.service);
                }
            }
            pair.bounded();
        }
        pair.exchange();
        let answer = pair.ask_new(GET);
        prop_assert!(answer.ends_with(&"x".repeat(3000)), "{}", answer);
    }
}
