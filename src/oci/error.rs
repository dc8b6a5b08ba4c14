//! Error bodies, as distribution-spec "Error codes" defines them.

pub use oci_spec::distribution::ErrorCode;

/// The JSON body of an error response: `{"errors":[{"code":…,"message":…}]}`.
#[must_use]
pub fn error_body(code: &ErrorCode, message: &str) -> String {
    serde_json::json!({ "errors": [{ "code": code, "message": message }] }).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_body_is_what_the_specification_says() {
        let body = error_body(&ErrorCode::NameUnknown, "no \"such\" name");
        assert_eq!(body, r#"{"errors":[{"code":"NAME_UNKNOWN","message":"no \"such\" name"}]}"#);
    }
}
