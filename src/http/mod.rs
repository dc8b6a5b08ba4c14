//! Faces that speak HTTP: registry mirror, S3 read endpoint, admin.

pub mod admin;
pub mod canary;
pub mod object;
pub mod registry;
pub mod served;
pub mod server;
