//! stub
use super::super::tenant::{Credential, Host};
use crate::{error::Refusal, wire::stream::Stream};
pub struct Opened { pub stream: Stream, pub process_id: i32, pub secret: Vec<u8>, pub parameters: Vec<(Vec<u8>, Vec<u8>)>, pub notices: Vec<Vec<u8>>, pub minor: u16 }
#[derive(Debug)]
pub struct DialOptions;
pub struct Target<'a> { pub host: &'a Host, pub database: &'a str, pub credential: &'a Credential }
#[derive(Debug, thiserror::Error)]
pub enum DialError { #[error("no role")] NoRole }
impl DialError { pub fn to_refusal(&self) -> Refusal { Refusal::Internal } }
pub async fn open(_: &Target<'_>, _: &DialOptions) -> Result<Opened, DialError> { Err(DialError::NoRole) }
pub async fn send_cancel(_: &Host, _: i32, _: &[u8], _: &DialOptions) -> std::io::Result<()> { Ok(()) }
