async function start() {
  const data = JSON.parse($("data").textContent);
  return new Page(new Recorded(data, await inflate($("table").textContent)));
}

const ready = start();
