//! Orders given at the command line: carried out as everybody's are, and told in words or as JSON.

use secrecy::ExposeSecret as _;

use crate::{
    cli::{
        Failure, Globals,
        actor::operator,
        login,
        output::line,
        progress::watched,
        table::{self, answer},
        tenant,
    },
    control_path::{
        admin::{
            actor::Actor,
            commands::{AdminCommand, CommandOutcome, MadeLogin, Removed},
            hosts::HostReport,
        },
        onboarding::{
            NewTenant, drop::Dropped, move_tenant::Moved, names::shell_word, rotate::RotatedTenant,
        },
    },
};

/// Has an order carried out by the person at this command line, and tells what came of it.
///
/// # Errors
/// [`Failure`], in one line.
pub async fn carry_out(globals: &Globals, order: AdminCommand, json: bool) -> Result<(), Failure> {
    carry_out_as(operator(globals).await?, order, json).await
}

/// The same for somebody who has been asked about already.
///
/// # Errors
/// [`Failure`], in one line.
pub async fn carry_out_as(mut operator: Actor, order: AdminCommand, json: bool) -> Result<(), Failure> {
    let (title, subject) = (order.title(), order.subject().to_owned());
    watched(&mut operator, order.takes_long());
    let outcome = order.execute(&operator).await?;
    drop(operator); // and with it what was shown of the work
    answer(json, &outcome, || tell(title, &subject, &outcome));
    Ok(())
}

fn tell(title: &str, subject: &str, outcome: &CommandOutcome) {
    match outcome {
        CommandOutcome::NewTenant(NewTenant { name, status, host, database, username }) => line(format!(
            "tenant {name} is {status}: database {database} on host {host}, role {username}\n\
             next: pglobby login create NAME --tenant {}",
            shell_word(name)
        )),
        CommandOutcome::Tenant(changed) => match title {
            "ALTER TENANT" => table::fields(&tenant::fields(changed)),
            "RENAME TENANT" => line(format!("tenant {subject} is now called {}", changed.name)),
            _ => line(format!("tenant {} is {}", changed.name, changed.status)),
        },
        CommandOutcome::RotatedTenant(RotatedTenant { name, roles, .. }) => {
            line(format!("tenant {name}: new passwords for {}", roles.join(" and ")));
        }
        CommandOutcome::MovedTenant(Moved {
            name,
            from,
            host,
            source_dropped,
            copied_by,
            dumped_because,
            held_ms,
            ..
        }) => {
            let rest = if *source_dropped { "is gone" } else { "is kept there, closed" };
            line(format!("tenant {name} is on host {host}; its old database on {from} {rest}"));
            let why = dumped_because.as_ref().map(|why| format!(" ({why})")).unwrap_or_default();
            line(format!("copied by {copied_by}{why}; clients were held for {held_ms} ms"));
        }
        CommandOutcome::DroppedTenant(Dropped { name, database, database_dropped, .. }) => {
            line(match database_dropped {
                true => format!("tenant {name} and its database are gone"),
                false => format!("tenant {name} is gone; database {database} stays"),
            })
        }
        CommandOutcome::MadeLogin(MadeLogin { name, tenant, kind, access, password }) => {
            let place = tenant.as_ref().map(|tenant| format!(" of tenant {tenant}")).unwrap_or_default();
            line(format!("{kind} login {name}{place} may log in ({access})"));
            if let Some(password) = password {
                line(format!("password (shown once): {}", password.expose_secret()));
            }
        }
        CommandOutcome::Login(changed) => table::fields(&login::fields(changed)),
        CommandOutcome::Removed(Removed { name, status }) => line(match *status {
            "removed" => format!("host {name} is forgotten"),
            _ => format!("login {name} is gone"),
        }),
        CommandOutcome::RotatedKeys(done) => {
            line(format!("{} credentials sealed anew with key {}", done.resealed, done.key));
            if !done.retired.is_empty() {
                line(format!("retired: {}", done.retired.join(", ")));
            }
        }
        CommandOutcome::Host(HostReport { name, .. }) => line(format!("host {name} is registered")),
    }
}
