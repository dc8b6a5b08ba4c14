//! Amazon ECR: which registries are, and the passwords that its API gives out for them.
//!
//! Invariant: one `GetAuthorizationToken` per account and region is in the air at a time, and none is sent while a
//! password has more than half of its life left, unless the registry refused it. A password lives in memory only.
//! This module refuses to bring an SDK for one request: it signs a POST with `aws-sigv4`, which S3's client brings.

mod name;
mod token;

pub(super) use name::EcrName;
pub(super) use token::EcrTokens;
