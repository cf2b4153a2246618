//! A server connection: its stream, its protocol state, and the queries that the proxy itself sends on it.
//!
//! The relay moves the client's bytes. The proxy's queries are sent only while the server owes no reply.

use std::{
    io,
    mem::MaybeUninit,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf};
use tracing::warn;

use super::NewConnection;
use crate::{
    data_path::{
        exchange::{Repeated, ServerSide, unread_request::FirstRequest},
        host_address::HostAddress,
        memory_limit::{Account, Charge, PIECE_BYTES},
        prepared::PreparedLimits,
        session_state::{Settings, parameter_status::ReportedParameters},
    },
    wire::{
        frame::{HEADER_BYTES, header},
        message::{append, append_cstr, bind, close_statement, execute, parse},
        server_error::ServerError,
        stream::Stream,
        unsent::Unsent,
    },
};

/// The longest answer to a query of the proxy.
const ANSWER_BYTES_MAX: usize = 1024 * 1024;

/// Only a row may be longer than this; a shorter message is always accepted.
const MESSAGE_BYTES_MAX: usize = 64 * 1024;

/// Bytes of an answer that are read at a time; most answers are shorter.
const ANSWER_READ_BYTES: usize = 1024;

/// After this time without a complete answer, the server is given up.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(10);

/// A server that has said its last words closes the connection within this time.
const END_TIME_MAX: Duration = Duration::from_secs(1);

/// How often, and after which pauses, it is looked for a reset that follows a connection's end: together longer than a
/// network takes.
const RESET_LOOKS: u32 = 10;
const RESET_LOOK_EVERY: Duration = Duration::from_millis(10);

/// One server connection. Dropping it closes it.
#[derive(Debug)]
pub struct Server {
    /// The connection.
    pub stream: Stream,
    /// Bytes that it has not taken yet.
    pub unsent: Unsent,
    /// Protocol state: pending replies, prepared statements, settings.
    pub side: ServerSide,
    /// Its startup parameters; RESET restores them.
    pub startup: Settings,
    /// NoticeResponse messages from its start.
    pub notices: Box<[u8]>,
    /// The server's process number.
    pub process_id: i32,
    /// The server's cancel key.
    pub secret: Box<[u8]>,
    /// The host's address that it was opened at.
    pub at: HostAddress,
    /// The server's end of the connection; `None`: a Unix socket.
    pub address: Option<SocketAddr>,
    /// How often the host's primary had changed when it was opened
    /// ([`AddressRoles::changes`](super::AddressRoles::changes)).
    pub primary_changes: u64,
    /// Notifications that came within an answer to the proxy; the client gets them.
    pub notified: Vec<u8>,
    /// NoticeResponse messages in the last answer to the proxy.
    pub answer_notices: Vec<u8>,
    /// A client got an error from it since the last after-transaction check.
    pub failed: bool,
    /// What its session has sent since it was borrowed, as long as it has not answered.
    pub first_request: FirstRequest,
    /// It has said its last words.
    pub has_ended: bool,
}

/// A row of an answer; `None` is NULL.
pub type Row = Vec<Option<Vec<u8>>>;

/// Why a query of the proxy was not answered.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// The server's ErrorResponse; the connection is in order.
    #[error("{0}")]
    Refused(ServerError),
    /// There was no answer within ten seconds; the connection is out of step.
    #[error("no answer to a query of the proxy")]
    Unanswered,
    /// The connection is lost or out of step.
    #[error("{0}")]
    Lost(#[from] io::Error),
}

impl Server {
    /// A connection that was just opened, for at most `prepared_max` statements.
    pub fn new(opened: NewConnection, prepared_max: PreparedLimits) -> Self {
        let mut reported = ReportedParameters::default();
        for (name, value) in &opened.parameters {
            reported.set(&String::from_utf8_lossy(name), value);
        }
        let address = opened.stream.addresses().map(|(_, theirs)| theirs);
        let mut side = ServerSide::new(reported, prepared_max);
        side.role.begins_as(opened.start_role.as_deref());
        side.notifications.process_id = opened.process_id;
        Self {
            stream: opened.stream,
            unsent: Unsent::default(),
            side,
            startup: Settings::default(),
            notices: opened.notices.concat().into(),
            answer_notices: Vec::new(),
            process_id: opened.process_id,
            secret: opened.secret.into(),
            at: opened.at,
            address,
            primary_changes: opened.primary_changes,
            notified: Vec::new(),
            failed: false,
            first_request: FirstRequest::default(),
            has_ended: false,
        }
    }

    /// Whether the next byte that is written begins a message.
    #[inline]
    pub fn takes_message(&self) -> bool {
        self.side.has_whole_messages() && self.unsent.is_empty()
    }

    /// Whether no message is under way in either direction.
    #[inline]
    pub fn is_between_messages(&self) -> bool {
        self.side.is_between_messages() && self.unsent.is_empty()
    }

    /// Whether an idle server has sent nothing but ParameterStatus, which is noted. A server that sends
    /// anything else has ended or is about to. Costs no system call unless the reactor has reported bytes.
    #[inline]
    pub fn is_quiet(&mut self, tenant: &str) -> bool {
        !self.stream.may_be_readable() || self.says_only_parameters(tenant)
    }

    fn says_only_parameters(&mut self, tenant: &str) -> bool {
        let mut bytes = [MaybeUninit::uninit(); 1024];
        let mut cx = Context::from_waker(Waker::noop());
        loop {
            let mut read = ReadBuf::uninit(&mut bytes);
            match Pin::new(&mut self.stream).poll_read(&mut cx, &mut read) {
                Poll::Pending => return true,
                Poll::Ready(Ok(())) if self.note_parameters(read.filled()) => {}
                Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::TimedOut => {
                    let server_pid = self.process_id;
                    warn!(
                        tenant, side = "server", server_pid, %error,
                        "idle server lost: no answer to TCP (server_tcp_user_timeout, keepalive)"
                    );
                    return false;
                }
                Poll::Ready(_) => return false,
            }
        }
    }

    /// Notes ParameterStatus messages; `false`: there are other bytes, or none.
    #[cold]
    fn note_parameters(&mut self, said: &[u8]) -> bool {
        let mut at = 0;
        while let Ok(Some(message)) = next_message(said, at) {
            if message.first() != Some(&b'S') {
                return false;
            }
            at += message.len();
            self.side.record_parameter(message);
        }
        at > 0 && at == said.len()
    }

    /// Whether a server that has said its last words had not read all that was sent to it: the connection is reset, or
    /// takes nothing. Waits for its end.
    #[cold]
    pub async fn has_left_unread(&mut self) -> bool {
        if !self.unsent.is_empty() {
            return true;
        }
        let mut more = [0; 64];
        let end = tokio::time::timeout(END_TIME_MAX, self.stream.read(&mut more)).await;
        match end {
            Ok(Err(error)) => return error.kind() == io::ErrorKind::ConnectionReset,
            Ok(Ok(0)) => {}
            Ok(Ok(_)) | Err(_) => return false,
        }
        // Where the connection was closed before the request came, the reset comes a moment after its end.
        for _ in 0..RESET_LOOKS {
            if self.stream.is_reset() {
                return true;
            }
            tokio::time::sleep(RESET_LOOK_EVERY).await;
        }
        self.stream.is_reset()
    }

    /// Runs a statement; returns its rows. After any error but
    /// [`AskError::Refused`] the server must be closed.
    pub async fn ask(&mut self, sql: &str, parameters: &[&str]) -> Result<Vec<Row>, AskError> {
        let request = unnamed_request(sql, parameters);
        self.execute_unnamed(request, Answer::default()).await.map(|(rows, _)| rows)
    }

    /// As [`Self::ask`], for an answer of up to `bytes_max`, which `memory` counts while the charge lives.
    pub async fn ask_for(
        &mut self,
        sql: &str,
        parameters: &[&str],
        bytes_max: usize,
        memory: &Arc<Account>,
    ) -> Result<(Vec<Row>, Charge), AskError> {
        let answer = Answer { bytes_max, memory: Some(memory.clone()), ..Answer::default() };
        self.execute_unnamed(unnamed_request(sql, parameters), answer).await
    }

    /// As [`Self::ask`], for a statement that is used often: the server keeps it prepared.
    pub async fn ask_again(
        &mut self,
        which: Repeated,
        sql: &str,
        parameters: &[&str],
    ) -> Result<Vec<Row>, AskError> {
        let mut request = Vec::new();
        let name = self.side.ours.parse_repeated(which, sql, &mut request);
        bind(name, parameters, &mut request);
        if name.is_empty() {
            return self.execute_unnamed(request, Answer::default()).await.map(|(rows, _)| rows);
        }
        execute(&mut request);
        append(&mut request, b'S', |_| {});
        match self.request(&request, Answer::default()).await {
            Err(AskError::Refused(error)) if error.is_too_long() => Err(AskError::Refused(error)),
            Err(AskError::Refused(_)) => {
                self.side.ours.repeated_failed(which);
                self.ask(sql, parameters).await
            }
            answer => answer.map(|(rows, _)| rows),
        }
    }

    /// Closes its unnamed statement: a session with a server of its own would find it.
    async fn execute_unnamed(
        &mut self,
        mut request: Vec<u8>,
        answer: Answer,
    ) -> Result<(Vec<Row>, Charge), AskError> {
        execute(&mut request);
        close_statement(b"", &mut request);
        append(&mut request, b'S', |_| {});
        self.side.statements.set_unnamed_unknown();
        let answer = self.request(&request, answer).await?;
        self.side.statements.set_unnamed(0);
        Ok(answer)
    }

    /// Runs a simple query.
    pub async fn run(&mut self, sql: &str) -> Result<Vec<Row>, AskError> {
        let mut request = Vec::new();
        append(&mut request, b'Q', |out| append_cstr(out, sql.as_bytes()));
        self.side.statements.set_unnamed(0);
        self.request(&request, Answer::default()).await.map(|(rows, _)| rows)
    }

    async fn request(&mut self, request: &[u8], answer: Answer) -> Result<(Vec<Row>, Charge), AskError> {
        self.answer_notices.clear();
        let exchange = async {
            self.stream.write_all(request).await?;
            self.stream.flush().await?;
            self.answer(answer).await
        };
        tokio::time::timeout(ANSWER_TIME_MAX, exchange).await.map_err(|_| AskError::Unanswered)?
    }

    /// Reads an answer to its end. One that is too long is dropped.
    async fn answer(&mut self, mut answer: Answer) -> Result<(Vec<Row>, Charge), AskError> {
        let mut buffer = Vec::new();
        loop {
            let mut at = 0;
            while let Some(message) = next_message(&buffer, at)? {
                at += message.len();
                self.read_message(message, &mut answer)?;
            }
            if answer.ready && at == buffer.len() {
                return answer.finish();
            }
            buffer.drain(..at);
            answer.skip_long_row(&mut buffer)?;
            buffer.reserve(ANSWER_READ_BYTES);
            if self.stream.read_buf(&mut buffer).await? == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            answer.skip(&mut buffer);
        }
    }

    fn read_message(&mut self, message: &[u8], answer: &mut Answer) -> io::Result<()> {
        match message.first() {
            // A notification may come at any time, also after ReadyForQuery.
            Some(b'A') if answer.has_room(message.len()) => self.notified.extend_from_slice(message),
            Some(b'A') => return Err(out_of_step()),
            Some(b'S') => drop(self.side.record_parameter(message)),
            Some(b'N') if answer.has_room(message.len()) => self.answer_notices.extend_from_slice(message),
            Some(b'N') => {}
            _ if answer.ready => return Err(out_of_step()),
            Some(b'D') => answer.row(message)?,
            Some(b'E') => answer.refused = Some(ServerError::read(message)),
            Some(b'Z') => answer.ready = true,
            _ => {}
        }
        Ok(())
    }
}

/// Room for what an unnamed request has besides its text: short parameters, and the messages behind it.
const UNNAMED_BYTES: usize = 256;

fn unnamed_request(sql: &str, parameters: &[&str]) -> Vec<u8> {
    let mut request = Vec::with_capacity(sql.len() + UNNAMED_BYTES);
    parse(b"", sql.as_bytes(), &mut request);
    bind(b"", parameters, &mut request);
    request
}

/// An answer that is being read.
struct Answer {
    rows: Vec<Row>,
    refused: Option<ServerError>,
    ready: bool,
    /// Bytes of the rows so far.
    bytes: usize,
    bytes_max: usize,
    /// Counts them, if the answer may be long.
    memory: Option<Arc<Account>>,
    charge: Charge,
    is_too_long: bool,
    /// Bytes still to come of a row that is skipped.
    skipping: usize,
}

impl Default for Answer {
    fn default() -> Self {
        Self {
            rows: Vec::new(),
            refused: None,
            ready: false,
            bytes: 0,
            bytes_max: ANSWER_BYTES_MAX,
            memory: None,
            charge: Charge::default(),
            is_too_long: false,
            skipping: 0,
        }
    }
}

/// A long answer is counted in steps of this size.
const COUNTED_BYTES: usize = 256 * 1024;

impl Answer {
    /// Counts so many more bytes; `false`: the answer is too long, and is dropped.
    fn has_room(&mut self, bytes: usize) -> bool {
        self.bytes = self.bytes.saturating_add(bytes);
        self.is_too_long |= self.bytes > self.bytes_max;
        if let Some(memory) = self.memory.as_ref().filter(|_| !self.is_too_long)
            && self.bytes > self.charge.bytes()
        {
            let counted = self.bytes.next_multiple_of(COUNTED_BYTES);
            self.is_too_long = self.charge.try_set(memory, counted).is_err();
        }
        if self.is_too_long {
            self.rows = Vec::new();
            self.charge.clear();
        }
        !self.is_too_long
    }

    fn row(&mut self, message: &[u8]) -> io::Result<()> {
        let row = row(message).ok_or_else(out_of_step)?;
        let cells = row.len() * (size_of::<Option<Vec<u8>>>() + PIECE_BYTES);
        if self.has_room(message.len() + cells) {
            self.rows.push(row);
        }
        Ok(())
    }

    /// Begins to skip a row that is too long by itself.
    fn skip_long_row(&mut self, buffer: &mut Vec<u8>) -> io::Result<()> {
        let Some((tag, length)) = header(buffer).map_err(io::Error::other)? else { return Ok(()) };
        // It would exist twice, and the buffer may be larger.
        let admits = |memory: &Arc<Account>| memory.admits(length.saturating_mul(3)).is_ok();
        let fits = length <= self.bytes_max && self.memory.as_ref().is_none_or(admits);
        if length <= MESSAGE_BYTES_MAX || fits {
            return Ok(());
        }
        if tag != b'D' {
            return Err(out_of_step());
        }
        self.has_room(usize::MAX);
        self.skipping = length + 1;
        self.skip(buffer);
        Ok(())
    }

    fn skip(&mut self, buffer: &mut Vec<u8>) {
        let skipped = self.skipping.min(buffer.len());
        buffer.drain(..skipped);
        self.skipping -= skipped;
    }

    fn finish(self) -> Result<(Vec<Row>, Charge), AskError> {
        match self.refused {
            Some(error) => Err(AskError::Refused(error)),
            None if self.is_too_long => Err(AskError::Refused(ServerError::too_long())),
            None => Ok((self.rows, self.charge)),
        }
    }
}

fn out_of_step() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "unexpected answer to a query of the proxy")
}

/// The message that starts at `at`; `None`: it is not complete.
fn next_message(buffer: &[u8], at: usize) -> io::Result<Option<&[u8]>> {
    let rest = buffer.get(at..).unwrap_or_default();
    let header = header(rest).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok(header.and_then(|(_, length)| rest.get(..length + 1)))
}

/// The columns of a DataRow.
fn row(message: &[u8]) -> Option<Row> {
    let (count, mut rest) = message.get(HEADER_BYTES..)?.split_first_chunk::<2>()?;
    let mut row = Vec::new();
    for _ in 0..u16::from_be_bytes(*count) {
        let (length, behind) = rest.split_first_chunk::<4>()?;
        rest = behind;
        match u32::from_be_bytes(*length) {
            u32::MAX => row.push(None),
            length => {
                let (value, behind) = rest.split_at_checked(length as usize)?;
                row.push(Some(value.to_vec()));
                rest = behind;
            }
        }
    }
    Some(row)
}
