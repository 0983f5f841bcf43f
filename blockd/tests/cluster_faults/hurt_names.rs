//! A host renamed: the same host to everybody, by its other name.

use anyhow::{Context, Result, ensure};

use crate::world::World;

const OTHER_NAME: &str = "renamed";

pub fn rename(world: &mut World, host: usize) -> Result<()> {
    let id = id_of(world, &world.hosts[host].name())?.context("it is there")?;
    give_name(world, host, OTHER_NAME)?;
    world.until("every host knows it by its other name", |world| {
        for asked in &world.hosts {
            let hosts = asked.get("/v1/hosts")?;
            let mut hosts = hosts.as_array().context("a list")?.iter();
            if !hosts.any(|host| host["name"] == OTHER_NAME && host["is_alive"] == true) {
                return Ok(false);
            }
        }
        Ok(true)
    })?;
    ensure!(
        id_of(world, OTHER_NAME)? == Some(id) && id_of(world, &world.hosts[host].name())?.is_none(),
        "it is another host now"
    );
    Ok(())
}

pub fn rename_back(world: &mut World, host: usize) -> Result<()> {
    let name = world.hosts[host].name();
    give_name(world, host, &name)
}

fn give_name(world: &mut World, host: usize, name: &str) -> Result<()> {
    world.hosts[host].kill()?;
    world.hosts[host].set_name(name)?;
    world.hosts[host].start(&world.network)
}

fn id_of(world: &World, name: &str) -> Result<Option<String>> {
    let hosts = world.hosts[0].get("/v1/hosts")?;
    let mut hosts = hosts.as_array().context("a list")?.iter();
    let host = hosts.find(|host| host["name"] == name);
    Ok(host.and_then(|host| host["id"].as_str()).map(str::to_owned))
}
