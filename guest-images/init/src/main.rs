//! guest-init
fn main() {}
