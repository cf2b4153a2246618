//! `pglobby doctor`: whether tenants are kept apart, proved.

use clap::Args;

use crate::{
    cli::{Failure, Globals, actor::operator, output, progress::watched, table::answer},
    control_path::doctor::{Finding, Report, examine},
};

/// Audit isolation, tenant by tenant, over real connections; exit status 1 on a finding
///
/// Looked at: what PUBLIC may enter; powers, memberships, grants and possessions of the tenants' roles; whether sealed
/// credentials open and log in as they should, and nowhere else; whether read-only roles can write; templates; the
/// central database; work that died on the way. Each finding says how to mend it.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pglobby doctor\n  pglobby doctor --tenants acme,globex --fix --json")]
pub struct Doctor {
    /// Only these tenants, and what all depend on
    #[arg(long, value_delimiter = ',', value_name = "A,B")]
    tenants: Vec<String>,
    /// Mend what can be mended without harm, then look again
    #[arg(long)]
    fix: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Doctor {
    /// Does it.
    ///
    /// # Errors
    /// [`Failure`], also where something was found.
    pub async fn run(self, globals: &Globals) -> Result<(), Failure> {
        let mut operator = operator(globals).await?;
        watched(&mut operator, true);
        let report = examine(&operator, &self.tenants, self.fix).await?;
        drop(operator); // and with it what was shown of the work
        answer(self.json, &report, || in_words(&report));
        let fixable = report.findings.iter().filter(|finding| finding.fixable).count();
        match (report.ok, fixable) {
            (true, _) => Ok(()),
            (false, 0) => Err(Failure::new(format!("{} findings", report.findings.len()))),
            (false, _) if self.fix => {
                Err(Failure::new(format!("{} findings are left", report.findings.len())))
            }
            (false, _) => Err(Failure::new(format!(
                "{} findings; {fixable} of them can be mended with `pglobby doctor --fix`",
                report.findings.len()
            ))),
        }
    }
}

fn in_words(report: &Report) {
    for finding in &report.fixed {
        output::line(format!("mended   {}", sentence(finding)));
    }
    for finding in &report.findings {
        output::line(format!("FINDING  {}\n         mend: {}", sentence(finding), finding.mend));
    }
    if report.ok {
        let (tenants, hosts) = (report.tenants, report.hosts);
        output::line(format!("all is well: tenants are kept apart (tenants: {tenants}, hosts: {hosts})"));
    }
}

fn sentence(finding: &Finding) -> String {
    let whose = [("tenant", &finding.tenant), ("host", &finding.host)];
    let whose = whose.iter().filter_map(|(what, name)| name.as_ref().map(|name| format!("{what} {name}")));
    let whose = whose.collect::<Vec<_>>().join(", ");
    let whose = if whose.is_empty() { "central database".to_owned() } else { whose };
    format!("{} ({whose}): {}", finding.check, finding.detail)
}
