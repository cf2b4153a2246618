//! `pglobby doctor`: checks that tenants are isolated from each other.

use clap::Args;

use crate::{
    cli::{
        Failure, Globals,
        actor::actor,
        output::{self, BAD, GOOD, coloured},
        progress::watch,
        table::answer,
    },
    control_path::doctor::{Finding, Report, examine},
};

/// Check the isolation of every tenant over real connections
///
/// Checks what PUBLIC may connect to; attributes, memberships, grants and objects of the tenants' roles; that
/// each sealed credential logs in to its own database and to no other; that read-only roles cannot write;
/// templates; the central database; interrupted operations. Each finding says how to fix it. The exit status
/// is 1 if there is one.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby doctor\n  pglobby doctor --tenants acme,globex --fix --json")]
pub struct Doctor {
    /// Check only these tenants, and what all tenants depend on
    #[arg(long, value_delimiter = ',', value_name = "A,B")]
    tenants: Vec<String>,
    /// Fix what can be fixed without harm, then check again
    #[arg(long)]
    fix: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Doctor {
    /// Runs the checks and prints the findings.
    ///
    /// # Errors
    /// The number of findings, after each of them is printed.
    pub async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let mut actor = actor(globals).await?;
        watch(&mut actor, true);
        let report = examine(&actor, &self.tenants, self.fix).await?;
        drop(actor); // Removes the progress bar before the result is printed.
        answer(self.json, &report, || print(&report));
        let findings = match report.findings.len() {
            1 => "1 finding".to_owned(),
            count => format!("{count} findings"),
        };
        let fixable = report.findings.iter().filter(|finding| finding.fixable).count();
        match (report.ok, fixable) {
            (true, _) => Ok(()),
            (false, 0) => Err(Failure::new(format!("{findings}; fix by hand as shown above"))),
            (false, _) if self.fix => Err(Failure::new(format!("{findings} left after --fix"))),
            (false, _) => Err(Failure::new(format!("{findings}; `pglobby doctor --fix` can fix {fixable}"))),
        }
    }
}

fn print(report: &Report) {
    for finding in &report.fixed {
        output::line(format!("{}  {}", coloured("fixed  ", GOOD), in_words(finding)));
    }
    for finding in &report.findings {
        let (word, fix) = (coloured("FINDING", BAD), &finding.mend);
        output::line(format!("{word}  {}\n         fix: {fix}", in_words(finding)));
    }
    if report.ok {
        let (word, tenants, hosts) = (coloured("ok", GOOD), report.tenants, report.hosts);
        output::line(format!("{word}  no findings (tenants checked: {tenants}, hosts: {hosts})"));
    }
}

fn in_words(finding: &Finding) -> String {
    let about = [("tenant", &finding.tenant), ("host", &finding.host)];
    let about = about.iter().filter_map(|(kind, name)| name.as_ref().map(|name| format!("{kind} {name}")));
    let about = about.collect::<Vec<_>>().join(", ");
    let about = if about.is_empty() { "central database".to_owned() } else { about };
    format!("{} ({about}): {}", finding.check, finding.detail)
}
