//! criu-relay moves a running process between hosts: it carries the images that CRIU writes from the host
//! where the process is dumped ([`proxy`]) to the host where it is restored ([`cache`]), through memory
//! alone.
//!
//! This is a library for the sake of its own tests and fuzzers; the program is `main.rs`, and what it
//! promises stands in criu-relay(8) and criu-relay-protocol(7).

pub mod store;
pub mod table;
pub mod wire;
