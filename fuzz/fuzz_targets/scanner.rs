//! Compares the SQL reader with PostgreSQL's own scanner and parser: the tokens of every text that the scanner takes, and
//! the statements of every text that the parser takes.
#![no_main]

use libfuzzer_sys::{Corpus, fuzz_target};
use pg_query::{
    NodeEnum as Node,
    protobuf::{Token, TransactionStmtKind as Transaction},
};

fuzz_target!(|text: &str| -> Corpus {
    // PostgreSQL gets no text with a zero byte.
    if text.contains('\0') {
        return Corpus::Reject;
    }
    let Ok(scanned) = pg_query::scan(text) else { return Corpus::Reject };
    let mut expected = Vec::new();
    for token in &scanned.tokens {
        let (start, end) = (token.start as usize, token.end as usize);
        match token.token() {
            Token::SqlComment | Token::CComment => {}
            // `$$$$` is an empty string.
            Token::Sconst => expected.push(start..end),
            // The reader needs no operators: each of their bytes is a token of its own.
            _ if text.as_bytes()[start..end]
                .iter()
                .all(|byte| b"+-*/<>=~!@#%^&|`?:.,;()[]$\\{}".contains(byte)) =>
            {
                expected.extend((start..end).map(|at| at..at + 1));
            }
            _ => expected.push(start..end),
        }
    }
    assert_eq!(pglobby::fuzzing::tokens(text), expected, "{text:?}");
    compare_statements(text);
    Corpus::Keep
});

/// A statement that the reader does not know may do anything, for it. One that it knows must be what PostgreSQL reads.
fn compare_statements(text: &str) {
    let Ok(parsed) = pg_query::parse(text, 0) else { return };
    let read = pglobby::fuzzing::read_statements(text);
    assert_eq!(read.len(), parsed.protobuf.stmts.len(), "{text:?} {read:?}");
    for (read, parsed) in read.iter().zip(&parsed.protobuf.stmts) {
        let Some(node) = parsed.stmt.as_ref().and_then(|stmt| stmt.node.as_ref()) else { continue };
        let Some((kinds, name)) = expected(node) else { continue };
        if !read.may_do_anything {
            assert!(kinds.contains(&read.kind.as_str()), "{text:?} {read:?} {kinds:?}");
        }
        if let (Some(read), Some(name)) = (&read.name, name) {
            assert_eq!(*read, name, "{text:?}");
        }
    }
}

/// The kinds that the reader may take a statement for, and the name in it.
fn expected(node: &Node) -> Option<(&'static [&'static str], Option<String>)> {
    let named = |name: &String| Some(name.clone()).filter(|name| !name.is_empty());
    Some(match node {
        Node::SelectStmt(_)
        | Node::InsertStmt(_)
        | Node::UpdateStmt(_)
        | Node::DeleteStmt(_)
        | Node::MergeStmt(_) => (&["Query", "CreateTemp"], None),
        Node::VariableSetStmt(set) => (
            &[
                "Set",
                "SetRole",
                "SetSessionAuthorization",
                "SetTransaction",
                "SetSessionCharacteristics",
                "Reset",
                "ResetAll",
            ],
            named(&set.name.to_ascii_lowercase()),
        ),
        Node::VariableShowStmt(_) => (&["Show"], None),
        Node::PrepareStmt(prepare) => (&["Prepare"], named(&prepare.name)),
        Node::ExecuteStmt(execute) => (&["Execute"], named(&execute.name)),
        Node::DeallocateStmt(deallocate) => (&["Deallocate", "DeallocateAll"], named(&deallocate.name)),
        Node::ListenStmt(listen) => (&["Listen"], named(&listen.conditionname)),
        Node::UnlistenStmt(unlisten) => (&["Unlisten"], named(&unlisten.conditionname)),
        Node::NotifyStmt(notify) => (&["Notify"], named(&notify.conditionname)),
        Node::DeclareCursorStmt(declare) => (&["DeclareCursor"], named(&declare.portalname)),
        Node::FetchStmt(fetch) => (&["Fetch"], named(&fetch.portalname)),
        Node::ClosePortalStmt(close) => (&["CloseCursor"], named(&close.portalname)),
        Node::DiscardStmt(_) => (&["Discard"], None),
        Node::LoadStmt(_) => (&["Load"], None),
        Node::CopyStmt(_) => (&["Copy"], None),
        Node::DoStmt(_) => (&["Do"], None),
        Node::CallStmt(_) => (&["Call"], None),
        Node::LockStmt(_) => (&["LockTable"], None),
        Node::ExplainStmt(_) => (&["Explain"], None),
        Node::ConstraintsSetStmt(_) => (&["SetConstraints"], None),
        Node::CreateFunctionStmt(_) => (&["CreateRoutine"], None),
        Node::TransactionStmt(transaction) => {
            let name = named(&transaction.savepoint_name);
            match Transaction::try_from(transaction.kind).ok()? {
                Transaction::Undefined => return None,
                Transaction::TransStmtBegin | Transaction::TransStmtStart => (&["Begin"], None),
                Transaction::TransStmtCommit => (&["Commit"], None),
                Transaction::TransStmtRollback => (&["Rollback"], None),
                Transaction::TransStmtSavepoint => (&["Savepoint"], name),
                Transaction::TransStmtRelease => (&["Release"], name),
                Transaction::TransStmtRollbackTo => (&["RollbackTo"], name),
                Transaction::TransStmtPrepare => (&["PrepareTransaction"], None),
                Transaction::TransStmtCommitPrepared | Transaction::TransStmtRollbackPrepared => {
                    (&["FinishPrepared"], None)
                }
            }
        }
        _ => return None,
    })
}
