//! Runs administration commands and prints their results, in words or as JSON.

use secrecy::ExposeSecret as _;

use crate::{
    cli::{Failure, Globals, actor::actor_with, login, output::line, progress::watch, table::answer, tenant},
    config::Config,
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

/// Runs a command as the user at this command line, and prints the result.
pub async fn run(globals: &Globals, command: AdminCommand, json: bool) -> Result<(), Failure> {
    let config = globals.load_config()?;
    run_as(actor_with(&config).await?, &config, command, json).await
}

/// The same with an actor that is open already.
pub async fn run_as(
    mut actor: Actor,
    config: &Config,
    command: AdminCommand,
    json: bool,
) -> Result<(), Failure> {
    let (title, subject) = (command.title(), command.subject().to_owned());
    watch(&mut actor, command.takes_long());
    let outcome = command.execute(&actor).await?;
    drop(actor); // Removes the progress bar before the result is printed.
    answer(json, &outcome, || print(title, &subject, &outcome, config));
    Ok(())
}

fn print(title: &str, subject: &str, outcome: &CommandOutcome, config: &Config) {
    match outcome {
        CommandOutcome::NewTenant(new) => print_new_tenant(new),
        CommandOutcome::Tenant(changed) => match title {
            "ALTER TENANT" => tenant::show(changed, config),
            "RENAME TENANT" => line(format!("tenant {subject} is renamed to {}", changed.name)),
            _ => line(format!("tenant {} is {}", changed.name, changed.status)),
        },
        CommandOutcome::RotatedTenant(RotatedTenant { name, roles, .. }) => {
            line(format!("tenant {name}: new passwords for roles {}", roles.join(" and ")));
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
            let old = if *source_dropped { "is dropped" } else { "is kept and closed to clients" };
            line(format!("tenant {name} is on host {host}; its old database on host {from} {old}"));
            let why = dumped_because.as_ref().map(|why| format!(" ({why})")).unwrap_or_default();
            line(format!("copied by {copied_by}{why}; clients waited {held_ms} ms"));
        }
        CommandOutcome::DroppedTenant(Dropped { name, database, database_dropped, .. }) => {
            line(match database_dropped {
                true => format!("tenant {name} is dropped, with database {database}"),
                false => format!("tenant {name} is dropped; database {database} is kept"),
            })
        }
        CommandOutcome::MadeLogin(MadeLogin { name, tenant, kind, access, password }) => {
            let of_tenant = tenant.as_ref().map(|tenant| format!(" of tenant {tenant}")).unwrap_or_default();
            line(match title {
                "CREATE LOGIN" => format!("{kind} login {name}{of_tenant} is created, access {access}"),
                _ => format!("{kind} login {name}{of_tenant} has a new password"),
            });
            if let Some(password) = password {
                line(format!("password (shown only now): {}", password.expose_secret()));
            }
        }
        CommandOutcome::Login(changed) => login::show(changed),
        CommandOutcome::Removed(Removed { name, status }) => line(match *status {
            "removed" => format!("host {name} is removed"),
            _ => format!("login {name} is dropped"),
        }),
        CommandOutcome::RotatedKeys(done) => {
            line(format!("{} credentials are sealed with key {} now", done.resealed, done.key));
            if !done.retired.is_empty() {
                line(format!("keys removed from the key ring: {}", done.retired.join(", ")));
            }
        }
        CommandOutcome::Host(HostReport { name, .. }) => line(format!("host {name} is registered")),
    }
}

fn print_new_tenant(new: &NewTenant) {
    let NewTenant { name, status, host, database, username, ro_username, member_of, transferred, notes } =
        new;
    line(format!("tenant {name} is {status}: database {database} on host {host}, role {username}"));
    if let Some(reader) = ro_username {
        line(format!("read-only role: {reader}"));
    }
    if let Some(owners) = member_of.as_ref().filter(|owners| !owners.is_empty()) {
        line(format!("role {username} is a member of {}, and may do what they may", owners.join(", ")));
    }
    if let Some(count) = transferred.filter(|count| *count > 0) {
        line(format!("role {username} is the owner of {count} objects that others owned"));
    }
    for note in notes.iter().flatten() {
        line(format!("note: {note}"));
    }
    line(format!("next: pglobby login create NAME --tenant {}", shell_word(name)));
}
