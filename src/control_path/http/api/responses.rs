//! Responses: the same objects as `--json` prints, and errors with stable codes.

use axum::{
    Json,
    http::{
        HeaderValue, StatusCode,
        header::{CACHE_CONTROL, RETRY_AFTER, WWW_AUTHENTICATE},
    },
    response::{IntoResponse, Response},
};
use serde::Serialize;
use serde_json::json;

use crate::control_path::admin::{
    actor::AdminError,
    commands::{AdminCommand, CommandOutcome},
};

/// An error: `{"error": {"code", "message"}}`.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    code: &'static str,
    message: String,
}

/// Every code with its status and meaning. Documented; must not change.
pub const CODES: [(&str, StatusCode, &str); 15] = [
    (
        "malformed",
        StatusCode::BAD_REQUEST,
        "the body is not JSON, or a text has a NUL character or is no UTF-8",
    ),
    ("unauthorized", StatusCode::UNAUTHORIZED, "no API key, or one that is unknown, expired or revoked"),
    ("forbidden", StatusCode::FORBIDDEN, "the key's role does not allow it"),
    ("not_found", StatusCode::NOT_FOUND, "no such tenant, login, host, operation or path"),
    ("method_not_allowed", StatusCode::METHOD_NOT_ALLOWED, "the path knows other methods"),
    ("exists", StatusCode::CONFLICT, "it is there already"),
    ("busy", StatusCode::CONFLICT, "another command works on the same tenant"),
    ("refused", StatusCode::CONFLICT, "its state does not allow it; the message says what to do"),
    ("body_too_large", StatusCode::PAYLOAD_TOO_LARGE, "more than max_body"),
    ("invalid", StatusCode::UNPROCESSABLE_ENTITY, "a field, a name or a value that cannot be"),
    ("too_many_requests", StatusCode::SERVICE_UNAVAILABLE, "max_requests or max_operations is reached"),
    ("timeout", StatusCode::SERVICE_UNAVAILABLE, "not answered within request_timeout; nothing was begun"),
    ("central_unavailable", StatusCode::SERVICE_UNAVAILABLE, "the central database"),
    ("host_unavailable", StatusCode::SERVICE_UNAVAILABLE, "a host cannot be reached, or said no"),
    ("keys_unavailable", StatusCode::SERVICE_UNAVAILABLE, "the key ring, or a credential that does not open"),
];

impl ApiError {
    /// An error with one of [`CODES`].
    pub fn new(code: &'static str, message: impl Into<String>) -> Self {
        let known = CODES.iter().find(|(known, ..)| *known == code);
        let status = known.map_or(StatusCode::INTERNAL_SERVER_ERROR, |(_, status, _)| *status);
        Self { status, code, message: message.into() }
    }
}

impl From<AdminError> for ApiError {
    fn from(error: AdminError) -> Self {
        let code = match &error {
            AdminError::NotFound { .. } => "not_found",
            AdminError::Exists(_) => "exists",
            AdminError::Busy { .. } => "busy",
            AdminError::Refused(_) => "refused",
            AdminError::Invalid(_) | AdminError::Name(_) => "invalid",
            AdminError::Central(error) if error.is_about_a_value() => "invalid",
            AdminError::Central(_) => "central_unavailable",
            AdminError::Connect { .. } | AdminError::Host { .. } => "host_unavailable",
            AdminError::Seal(_) | AdminError::Keyring(_) => "keys_unavailable",
        };
        Self::new(code, error.to_string())
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = json!({ "error": { "code": self.code, "message": self.message } });
        let mut response = (self.status, Json(body)).into_response();
        let headers = response.headers_mut();
        match self.status {
            StatusCode::UNAUTHORIZED => headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer")),
            StatusCode::SERVICE_UNAVAILABLE => headers.insert(RETRY_AFTER, HeaderValue::from_static("1")),
            _ => None,
        };
        response
    }
}

/// What is there.
pub fn shown(value: &impl Serialize) -> Response {
    answered(StatusCode::OK, value)
}

/// The answer to a command: 201 if it created something.
pub fn done(created: bool, outcome: &CommandOutcome) -> Response {
    answered(if created { StatusCode::CREATED } else { StatusCode::OK }, outcome)
}

/// Answers may contain passwords and must not be cached.
pub fn answered(status: StatusCode, value: &impl Serialize) -> Response {
    (status, [(CACHE_CONTROL, "no-store")], Json(value)).into_response()
}

/// Whether a command creates something.
pub fn creates(command: &AdminCommand) -> bool {
    matches!(
        command,
        AdminCommand::CreateTenant(_)
            | AdminCommand::AdoptTenant(_)
            | AdminCommand::CreateLogin { .. }
            | AdminCommand::AddHost(_)
    )
}
