//! Handlers of calls, one file per family. A handler takes decoded arguments and returns a reply or an error; it sends
//! nothing itself.

pub mod absent;
pub mod block_tune;
pub mod capabilities;
pub mod connect;
pub mod console;
pub mod domain_config;
pub mod domain_devices;
pub mod domain_info;
pub mod domain_list;
pub mod domain_run;
pub mod node;
pub mod stats;
pub mod subscribe;
