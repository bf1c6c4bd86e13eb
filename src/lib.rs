//! criu-relay moves a running process between hosts: it carries the images that CRIU writes from the host
//! where the process is dumped ([`proxy`]) to the host where it is restored ([`cache`]), through memory
//! alone.
//!
//! This is a library for the sake of its own tests and fuzzers; the program is `main.rs`, and what it
//! promises stands in criu-relay(8) and criu-relay-protocol(7).

#![forbid(unsafe_code)]

pub mod cache;
pub mod cli;
pub mod client;
pub mod daemon;
pub mod deferred;
pub mod memory;
pub mod net;
pub mod peer;
pub mod proxy;
pub mod pump;
pub mod reactor;
pub mod record;
pub mod resolve;
pub mod script;
pub mod session;
pub mod sockets;
pub mod store;
pub mod table;
pub mod times;
pub mod view;
pub mod wait;
pub mod wire;
