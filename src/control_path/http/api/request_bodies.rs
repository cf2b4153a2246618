//! Request bodies: JSON, parsed strictly, turned into an [`AdminCommand`] where the body alone decides.

use axum::{
    body::Bytes,
    extract::{FromRequest, Request},
    http::StatusCode,
};
use secrecy::SecretString;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use super::responses::ApiError;
use crate::{
    config::units,
    control_path::{
        admin::{
            commands::AdminCommand,
            hosts::NewHost,
            logins::{NewLogin, NewLoginKind},
            tenants::SuspendSessions,
        },
        onboarding::{
            adopt::AdoptTenant, create::CreateTenant, move_tenant::MoveTenant, schema_files::SchemaFile,
        },
        secrets::scram_verifier::LoginPassword,
        timestamp::parse_timestamp,
    },
};

/// A parsed body; an empty one counts as `{}`.
pub struct Body<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let bytes =
            Bytes::from_request(request, state).await.map_err(|rejection| match rejection.status() {
                StatusCode::PAYLOAD_TOO_LARGE => {
                    ApiError::new("body_too_large", "the body is longer than max_body of [http] allows")
                }
                _ => ApiError::new("malformed", "the body did not arrive whole"),
            })?;
        Self::parse(&bytes)
    }
}

impl<T: DeserializeOwned> Body<T> {
    /// Parses the bytes of a body.
    pub fn parse(bytes: &[u8]) -> Result<Self, ApiError> {
        let text: &[u8] = if bytes.is_empty() { b"{}" } else { bytes };
        if holds_nul(text) {
            return Err(ApiError::new(
                "malformed",
                "a text in the body holds a NUL character, which PostgreSQL cannot store",
            ));
        }
        serde_json::from_slice(text).map(Self).map_err(|error| {
            let code = if error.is_data() { "invalid" } else { "malformed" };
            ApiError::new(code, error.to_string())
        })
    }
}

/// Whether a string of this JSON contains NUL, which JSON can write only as `\u0000`.
fn holds_nul(json: &[u8]) -> bool {
    let mut escaped = false;
    json.iter().enumerate().any(|(at, byte)| {
        escaped = *byte == b'\\' && !escaped;
        escaped && json.get(at + 1..at + 6) == Some(b"u0000")
    })
}

/// `POST /v1/tenants`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewTenantBody {
    name: String,
    host: Option<String>,
    database: Option<String>,
    template: Option<String>,
    /// SQL texts, run in this order.
    #[serde(default)]
    schema: Vec<String>,
    /// The database exists already.
    #[serde(default)]
    adopt: bool,
    owner: Option<String>,
    ownership: Option<String>,
    username: Option<String>,
    password: Option<SecretString>,
}

impl TryFrom<NewTenantBody> for AdminCommand {
    type Error = ApiError;

    fn try_from(body: NewTenantBody) -> Result<Self, ApiError> {
        let NewTenantBody { name, host, database, template, schema, adopt, owner, .. } = body;
        let (ownership, username, password) = (body.ownership, body.username, body.password);
        if adopt {
            if template.is_some() || !schema.is_empty() {
                return Err(invalid("a database that is adopted takes no template and no schema"));
            }
            let ownership = ownership.map(|word| word.parse()).transpose();
            let ownership = ownership.map_err(|why: String| invalid(&why))?;
            let wanted = AdoptTenant { name, host, database, owner, ownership, username, password };
            return Ok(Self::AdoptTenant(wanted));
        }
        if owner.is_some() || ownership.is_some() || username.is_some() || password.is_some() {
            return Err(invalid(
                "owner, ownership, username and password are for a database that is adopted (\"adopt\": true)",
            ));
        }
        // psql would run commands of the text on this node.
        let file = |(at, sql): (usize, String)| SchemaFile::of_text(format!("schema[{at}]"), sql);
        let schema = schema.into_iter().enumerate().map(file).collect();
        Ok(Self::CreateTenant(CreateTenant { name, host, database, template, schema }))
    }
}

/// `POST /v1/tenants/{name}/suspend`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SuspendBody {
    reason: Option<String>,
    #[serde(default)]
    after_transaction: bool,
}

impl SuspendBody {
    /// The command.
    pub fn of(self, name: String) -> AdminCommand {
        let sessions = SuspendSessions::ending(self.after_transaction);
        AdminCommand::SuspendTenant { name, reason: self.reason, sessions }
    }
}

/// `POST /v1/tenants/{name}/rename`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RenameBody {
    /// The new name.
    pub to: String,
}

/// `POST /v1/tenants/{name}/move`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoveBody {
    host: String,
    patience: Option<String>,
    #[serde(default)]
    keep_source: bool,
}

impl MoveBody {
    /// The command.
    pub fn of(self, name: String) -> Result<AdminCommand, ApiError> {
        let patience = units::duration(self.patience.as_deref().unwrap_or(MoveTenant::PATIENCE));
        let patience = patience.map_err(|why| invalid(&format!("patience {why}")))?;
        let to = MoveTenant { host: self.host, patience, keep_source: self.keep_source };
        Ok(AdminCommand::MoveTenant { name, to })
    }
}

/// `POST /v1/logins`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewLoginBody {
    name: String,
    tenant: Option<String>,
    #[serde(default)]
    service: bool,
    #[serde(default)]
    tenants: Vec<String>,
    #[serde(default)]
    all_tenants: bool,
    #[serde(default)]
    admin: bool,
    #[serde(default)]
    read_only: bool,
    password: Option<SecretString>,
    valid_until: Option<String>,
    #[serde(default)]
    allow_from: Vec<String>,
}

impl TryFrom<NewLoginBody> for AdminCommand {
    type Error = ApiError;

    fn try_from(body: NewLoginBody) -> Result<Self, ApiError> {
        let kind = match (body.tenant, body.service, body.admin) {
            (Some(tenant), false, false) => NewLoginKind::Employee { tenant },
            (None, true, false) => {
                NewLoginKind::Service { tenants: body.tenants.clone(), all_tenants: body.all_tenants }
            }
            (None, false, true) => NewLoginKind::Admin,
            _ => return Err(invalid("a login is of one \"tenant\", or a \"service\", or an \"admin\"")),
        };
        let is_service = matches!(kind, NewLoginKind::Service { .. });
        if !is_service && (body.all_tenants || !body.tenants.is_empty()) {
            return Err(invalid("tenants and all_tenants are for a service"));
        }
        let valid_until = body.valid_until.as_deref().map(parse_timestamp).transpose();
        let LoginPassword { password, generated } = LoginPassword::given_or_generated(body.password);
        let login = NewLogin {
            name: body.name,
            kind,
            read_only: body.read_only,
            password,
            valid_until: valid_until.map_err(|why| invalid(&format!("valid_until: {why}")))?,
            allow_from: body.allow_from,
        };
        Ok(Self::CreateLogin { login, generated })
    }
}

/// `POST /v1/logins/{name}/set-password`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PasswordBody {
    /// Without it, one is generated.
    pub password: Option<SecretString>,
}

/// `POST /v1/logins/{name}/grant` and `…/revoke`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrantBody {
    #[serde(default)]
    tenants: Vec<String>,
    #[serde(default)]
    all_tenants: bool,
    #[serde(default)]
    read_only: bool,
}

impl GrantBody {
    /// The command.
    pub fn of(self, name: String, grant: bool) -> Result<AdminCommand, ApiError> {
        let Self { tenants, all_tenants, read_only } = self;
        if tenants.is_empty() && !all_tenants {
            return Err(invalid("name \"tenants\", or \"all_tenants\": true"));
        }
        Ok(match grant {
            true => AdminCommand::Grant { name, tenants, all_tenants, read_only },
            false => AdminCommand::Revoke { name, tenants, all_tenants },
        })
    }
}

/// `POST /v1/hosts`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewHostBody {
    name: String,
    address: String,
    port: Option<u16>,
    tls_mode: Option<String>,
    tls_root_ca: Option<String>,
    admin_user: Option<String>,
    admin_database: Option<String>,
    admin_password: Option<SecretString>,
    max_connections: Option<u32>,
    accepts_tenants: Option<bool>,
}

impl From<NewHostBody> for AdminCommand {
    fn from(body: NewHostBody) -> Self {
        Self::AddHost(NewHost {
            name: body.name,
            address: body.address,
            port: body.port.unwrap_or(5432),
            tls_mode: body.tls_mode.unwrap_or_else(|| "prefer".to_owned()),
            tls_root_ca: body.tls_root_ca,
            admin_user: body.admin_user.unwrap_or_else(|| "postgres".to_owned()),
            admin_database: body.admin_database.unwrap_or_else(|| "postgres".to_owned()),
            admin_password: body.admin_password,
            max_connections: body.max_connections,
            accepts_tenants: body.accepts_tenants.unwrap_or(true),
        })
    }
}

/// `POST /v1/keys/rotate`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RotateKeysBody {
    /// Remove keys that seal nothing any more.
    #[serde(default)]
    pub retire: bool,
}

/// A PATCH: settings with new values as `set KEY=VALUE` takes them; `null` restores the default.
pub fn settings(body: Map<String, Value>) -> Result<Vec<(String, String)>, ApiError> {
    if body.is_empty() {
        return Err(invalid("nothing is to be changed: name a setting"));
    }
    let text = |value: Value| match value {
        Value::Null => Some(String::new()),
        Value::Bool(truth) => Some(truth.to_string()),
        Value::Number(number) => Some(number.to_string()),
        Value::String(text) => Some(text),
        Value::Array(items) => {
            let texts: Option<Vec<&str>> = items.iter().map(Value::as_str).collect();
            texts.map(|texts| texts.join(","))
        }
        Value::Object(_) => None,
    };
    let pair = |(key, value)| match text(value) {
        Some(text) => Ok((key, text)),
        None => Err(invalid(&format!("{key} is a text, a number, true, false, null or a list of texts"))),
    };
    body.into_iter().map(pair).collect()
}

/// The error for an invalid value.
pub fn invalid(message: &str) -> ApiError {
    ApiError::new("invalid", message)
}

/// Reads bytes as each kind of body.
#[cfg(any(test, fuzzing))]
pub fn read_any(bytes: &[u8]) {
    if let Ok(Body(map)) = Body::<Map<String, Value>>::parse(bytes) {
        let _ = settings(map);
    }
    let _ = Body::<NewTenantBody>::parse(bytes).and_then(|Body(body)| AdminCommand::try_from(body));
    let _ = Body::<NewLoginBody>::parse(bytes).and_then(|Body(body)| AdminCommand::try_from(body));
    let _ = Body::<NewHostBody>::parse(bytes);
    let _ = Body::<MoveBody>::parse(bytes);
    let _ = Body::<SuspendBody>::parse(bytes);
    let _ = Body::<GrantBody>::parse(bytes);
    let _ = Body::<PasswordBody>::parse(bytes);
}

#[cfg(test)]
mod tests {
    use super::holds_nul;

    #[test]
    fn a_nul_is_found_where_json_means_one() {
        for (json, found) in [
            (r#"{"name":"a\u0000b"}"#, true),
            (r#"{"name":"\\\u0000"}"#, true),
            (r#"{"name":"\\u0000"}"#, false),
            (r#"{"name":"\u00001"}"#, true),
            (r#"{"name":"\u0001u0000"}"#, false),
            (r#"{"name":"\"#, false),
        ] {
            assert_eq!(holds_nul(json.as_bytes()), found, "{json}");
        }
    }
}
