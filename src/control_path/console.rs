//! The admin console. (Being built.)

use std::sync::Arc;

use crate::{
    data_path::{proxy::Console, refuse},
    error::Refusal,
};

/// What the data path calls for an administrator.
pub fn door() -> Console {
    Arc::new(|visit| {
        Box::pin(async move { refuse(visit.stream, &Refusal::NotSupported("no console yet".into())).await })
    })
}
