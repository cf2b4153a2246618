//! Commands to several nodes: which nodes, what is recorded for those that start later, and what becomes of it.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tracing::warn;

use super::{
    ConsoleError, Session,
    node_command::{NodeCommand, Place},
    this_node::Reach,
};
use crate::control_path::{
    admin::actor::nearest,
    fleet::{
        FleetError,
        nodes::{self, NodeSummary},
        pauses::PauseKind,
        requests::{NodeReply, Outcome},
    },
};

/// What nodes ask of each other.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NodeRequest {
    /// Run a command; `all_nodes`: its rows are in the central database.
    Run { command: NodeCommand<i64>, all_nodes: bool },
    /// SHOW.
    Show(Vec<String>),
}

/// The nodes of a statement.
pub enum Target {
    /// This one.
    This,
    /// Another one.
    Other(NodeSummary),
    /// All of them.
    All,
}

impl Session {
    /// Runs the command where `place` says.
    pub(super) async fn run_node_command(
        &mut self,
        written: &NodeCommand<String>,
        place: &Place,
    ) -> Result<(), ConsoleError> {
        let id = match written.tenant() {
            Some(tenant) => self.id_of(tenant).await?,
            None => 0,
        };
        let command = written.with_id(id);
        let is_for_all = !command.is_for_one_node();
        match self.target(place, is_for_all).await? {
            Target::This => {
                let ended = self.this_node().run(&command, Reach::Node).await?;
                found_client(&command, ended.as_u64().unwrap_or(0))
            }
            Target::Other(node) => {
                self.audit(written, Some(&node.name)).await;
                let request = NodeRequest::Run { command: command.clone(), all_nodes: false };
                let ended = self.ask_one(&node, &request).await?;
                found_client(&command, ended.as_u64().unwrap_or(0))
            }
            Target::All => self.run_on_all(&command, written).await,
        }
    }

    /// Who has asked other nodes for what. The command does not depend on it.
    async fn audit(&self, command: &NodeCommand<String>, node: Option<&str>) {
        let (actor, action) = (self.actor(), format!("fleet.{}", command.title().to_lowercase()));
        let client_id = if let NodeCommand::KillClient(id) = command { Some(id) } else { None };
        let detail = json!({ "node": node, "client": client_id });
        let written = async {
            let client = actor.central.client().await?;
            actor.audit(&**client, &action, command.tenant().map(String::as_str), &detail).await
        };
        if let Err(error) = written.await {
            warn!(action, side = "central", %error, "command to other nodes is not in the audit log");
        }
    }

    /// Which nodes `place` means.
    pub(super) async fn target(&self, place: &Place, all: bool) -> Result<Target, ConsoleError> {
        let fleet = &self.context.fleet;
        let name = match place {
            Place::Default if !all => return Ok(Target::This),
            Place::Default | Place::AllNodes => return Ok(Target::All),
            Place::Node(name) => name,
        };
        let known = match nodes::list(&self.context.admin.central).await {
            Ok(known) => known,
            // Without the central database this node knows its own name.
            Err(_) if fleet.is_this_node(name) => return Ok(Target::This),
            Err(error) => return Err(error.into()),
        };
        let node = find(&known, name)?;
        let is_this = fleet.registration.id().map_or(fleet.is_this_node(&node.name), |id| id == node.id);
        Ok(if is_this { Target::This } else { Target::Other(node.clone()) })
    }

    async fn run_on_all(
        &mut self,
        command: &NodeCommand<i64>,
        written: &NodeCommand<String>,
    ) -> Result<(), ConsoleError> {
        if let NodeCommand::KillClient(_) = command {
            // Its id is of one node, most often of this one.
            let ended = self.this_node().run(command, Reach::Node).await?.as_u64().unwrap_or(0);
            if ended > 0 {
                return Ok(());
            }
        }
        if let Err(error) = self.record(command).await {
            return self.run_alone(command, &error).await;
        }
        self.audit(written, None).await;
        let request = NodeRequest::Run { command: command.clone(), all_nodes: true };
        // This process ends, or may do so, when the others know.
        if command.is_for_one_node() {
            let replies = self.ask(None, &request).await?;
            self.this_node().run(command, Reach::Fleet).await?;
            return self.conclude(command, 0, replies);
        }
        let this = self.this_node();
        let (ran, replies) = tokio::join!(this.run(command, Reach::Fleet), self.ask_or_older(None, &request));
        let ended = ran?.as_u64().unwrap_or(0);
        match replies {
            Ok(replies) => self.conclude(command, ended, replies),
            Err(FleetError::OlderSchema) => self.on_this_node_only(command, ended),
            Err(error) => Err(unconfirmed(command, &error)),
        }
    }

    /// Writes what holds for nodes that start later, too.
    async fn record(&self, command: &NodeCommand<i64>) -> Result<(), FleetError> {
        let pauses = &self.context.fleet.pauses;
        match command {
            NodeCommand::Pause(scope) | NodeCommand::Kill(scope) => {
                pauses.add(PauseKind::Paused, *scope, &self.actor().name).await
            }
            NodeCommand::Disable(tenant) => {
                pauses.add(PauseKind::Disabled, Some(*tenant), &self.actor().name).await
            }
            NodeCommand::Resume(scope) => pauses.remove(PauseKind::Paused, *scope).await,
            NodeCommand::Enable(tenant) => pauses.remove(PauseKind::Disabled, Some(*tenant)).await,
            _ => Ok(()),
        }
    }

    /// Without the tables, or without the central database: this node only.
    async fn run_alone(
        &mut self,
        command: &NodeCommand<i64>,
        error: &FleetError,
    ) -> Result<(), ConsoleError> {
        let is_older = matches!(error, FleetError::OlderSchema);
        let reach = if is_older { Reach::Node } else { Reach::CutOff };
        let ended = self.this_node().run(command, reach).await?;
        match is_older {
            true => self.on_this_node_only(command, ended.as_u64().unwrap_or(0)),
            false => Err(unconfirmed(command, error)),
        }
    }

    fn on_this_node_only(&mut self, command: &NodeCommand<i64>, ended: u64) -> Result<(), ConsoleError> {
        let words = format!("{} was done on this node only: {}", command.title(), FleetError::OlderSchema);
        self.notices.push(ConsoleError::new("01000", words));
        found_client(command, ended)
    }

    /// Asks other nodes.
    pub(super) async fn ask(
        &self,
        target: Option<i64>,
        request: &NodeRequest,
    ) -> Result<Vec<NodeReply>, ConsoleError> {
        Ok(self.ask_or_older(target, request).await?)
    }

    /// Asks one node.
    pub(super) async fn ask_one(
        &self,
        node: &NodeSummary,
        request: &NodeRequest,
    ) -> Result<Value, ConsoleError> {
        let replies = self.ask(Some(node.id), request).await?;
        let conclusion = Conclusion::of(replies, self.context.admin.central.timeout());
        match (conclusion.error, conclusion.results.into_iter().next()) {
            (Some(error), _) => Err(error),
            (None, Some(result)) => Ok(result),
            (None, None) => {
                Err(ConsoleError::new("58000", format!("node \"{}\" does not run any more", node.name))
                    .hint("SHOW NODES lists those that serve."))
            }
        }
    }

    async fn ask_or_older(
        &self,
        target: Option<i64>,
        request: &NodeRequest,
    ) -> Result<Vec<NodeReply>, FleetError> {
        let ends = matches!(request, NodeRequest::Run { command: NodeCommand::Shutdown(_), .. });
        let request = serde_json::to_value(request).unwrap_or_default();
        let mut replies = self.context.fleet.ask(target, &self.actor().name, &request).await?;
        // A node takes its answer along when it ends. What SHUTDOWN asks for is done then.
        for reply in replies.iter_mut().filter(|reply| ends && reply.outcome == Outcome::Gone) {
            reply.outcome = Outcome::Done(Value::Null);
        }
        Ok(replies)
    }

    /// The result of a command that other nodes were asked to run. `ended`: sessions that this node has ended.
    fn conclude(
        &mut self,
        command: &NodeCommand<i64>,
        ended: u64,
        replies: Vec<NodeReply>,
    ) -> Result<(), ConsoleError> {
        let mut conclusion = Conclusion::of(replies, self.context.admin.central.timeout());
        self.notices.append(&mut conclusion.notices);
        let everywhere = conclusion.results.iter().filter_map(Value::as_u64).sum::<u64>();
        match conclusion.error {
            Some(error) => Err(error),
            None => found_client(command, ended + everywhere),
        }
    }

    async fn id_of(&self, tenant: &str) -> Result<i64, ConsoleError> {
        match self.proxy.directory.tenant(tenant).await {
            Ok(Some(tenant)) => Ok(tenant.id),
            Ok(None) => Err(ConsoleError::new("3D000", format!("there is no tenant \"{tenant}\""))
                .hint("SHOW TENANTS lists them.")),
            Err(error) => Err(ConsoleError::new("58000", error.to_string())),
        }
    }
}

/// What the replies of other nodes come to.
pub(super) struct Conclusion {
    /// Of the nodes that have done it.
    pub results: Vec<Value>,
    /// Each with the name of its node.
    pub named: Vec<(String, Value)>,
    /// Nodes that were not waited for.
    pub notices: Vec<ConsoleError>,
    /// Of the nodes that failed or did not answer.
    pub error: Option<ConsoleError>,
}

impl Conclusion {
    /// `begin_within`: the time in which a node has to begin.
    pub fn of(replies: Vec<NodeReply>, begin_within: std::time::Duration) -> Self {
        let mut conclusion =
            Self { results: Vec::new(), named: Vec::new(), notices: Vec::new(), error: None };
        let mut problems: Vec<ConsoleError> = Vec::new();
        for NodeReply { node, outcome } in replies {
            match outcome {
                Outcome::Done(result) => {
                    conclusion.results.push(result.clone());
                    conclusion.named.push((node, result));
                }
                Outcome::Failed(error) => {
                    let error = ConsoleError::of_json(&error);
                    let message = format!("node \"{node}\": {}", error.message);
                    problems.push(ConsoleError { message, ..error });
                }
                Outcome::Silent => problems.push(
                    ConsoleError::new(
                        "58000",
                        format!("node \"{node}\" did not answer within {begin_within:?}"),
                    )
                    .hint(
                        "The other nodes have done it. PAUSE, KILL and DISABLE stay recorded, and the node \
                             follows when it reads that. SHOW NODES shows whether it serves.",
                    ),
                ),
                Outcome::Gone => {
                    let words = format!("node \"{node}\" does not run any more and was not waited for");
                    conclusion.notices.push(ConsoleError::new("01000", words));
                }
            }
        }
        conclusion.error = problems.into_iter().reduce(|first, next| ConsoleError {
            message: format!("{}; {}", first.message, next.message),
            ..first
        });
        conclusion
    }
}

/// The node that `name` means: a name, or the id where names are not enough.
fn find<'n>(known: &'n [NodeSummary], name: &str) -> Result<&'n NodeSummary, ConsoleError> {
    let named: Vec<&NodeSummary> = known.iter().filter(|node| node.name.eq_ignore_ascii_case(name)).collect();
    let serving: Vec<&NodeSummary> = named.iter().copied().filter(|node| node.is_serving()).collect();
    let by_id = || known.iter().find(|node| node.id.to_string() == name);
    match (serving.as_slice(), named.last()) {
        ([node], _) => Ok(node),
        ([], Some(newest)) => Ok(newest),
        ([], None) => by_id().ok_or_else(|| {
            let near = nearest(name, known.iter().map(|node| node.name.as_str()));
            let near = near.map(|near| format!("; did you mean \"{near}\"?")).unwrap_or_default();
            ConsoleError::new("42704", format!("there is no node \"{name}\"{near}"))
                .hint("SHOW NODES lists them.")
        }),
        _ => Err(ConsoleError::new("42725", format!("several nodes have the name \"{name}\""))
            .hint("Write the id that SHOW NODES has.")),
    }
}

fn found_client(command: &NodeCommand<i64>, ended: u64) -> Result<(), ConsoleError> {
    match command {
        NodeCommand::KillClient(id) if ended == 0 => {
            Err(ConsoleError::new("42704", format!("there is no client {id}"))
                .hint("SHOW CLIENTS has the ids; SHOW CLIENTS ON ALL NODES has those of all nodes."))
        }
        _ => Ok(()),
    }
}

fn unconfirmed(command: &NodeCommand<i64>, error: &FleetError) -> ConsoleError {
    let words =
        format!("{} was done on this node only, other nodes could not be asked: {error}", command.title());
    ConsoleError::new("58000", words).hint(
        "Repeat it when the central database answers, which all nodes then follow, or send it to each node with \
         ON NODE and its name.",
    )
}

impl From<FleetError> for ConsoleError {
    fn from(error: FleetError) -> Self {
        let sqlstate = if matches!(error, FleetError::OlderSchema) { "55000" } else { "58000" };
        Self::new(sqlstate, error.to_string())
    }
}

impl ConsoleError {
    /// For another node.
    pub(super) fn to_json(&self) -> Value {
        json!({ "sqlstate": self.sqlstate, "message": self.message, "hint": self.hint })
    }

    /// Of another node.
    fn of_json(error: &Value) -> Self {
        let text = |key: &str| error.get(key).and_then(Value::as_str).map(str::to_owned);
        let sqlstate = text("sqlstate").filter(|code| code.len() == 5).unwrap_or_else(|| "58000".to_owned());
        Self {
            sqlstate: sqlstate.into(),
            message: text("message").unwrap_or_else(|| "unknown error".to_owned()),
            hint: text("hint").map(Into::into),
        }
    }
}
