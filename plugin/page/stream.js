/* Reads server-sent events by fetch, which unlike EventSource can send the token in a header. */

const SILENCE = 20000;
const PAUSE = 3000;
const FULL = 10000;

/** Calls back with each event until `stop`; `start` begins again. */
export class Stream {
  constructor(calls) {
    this.calls = calls;
    this.token = "";
    this.abort = null;
    this.timer = 0;
  }

  start() {
    this.stop();
    this.abort = new AbortController();
    this.run(this.abort);
  }

  stop() {
    clearTimeout(this.timer);
    if (this.abort) this.abort.abort();
    this.abort = null;
  }

  async run(abort) {
    let pause = PAUSE;
    try {
      const headers = this.token ? { Authorization: `Bearer ${this.token}` } : {};
      const options = { headers, cache: "no-store", signal: abort.signal };
      this.watch(abort);
      const answer = await fetch("events", options);
      if (answer.ok) {
        await this.read(answer.body, abort);
      } else {
        const refusal = await answer.json();
        if (answer.status === 401 || answer.status === 403) {
          this.stop();
          this.calls.refused(answer.status, refusal);
          return;
        }
        pause = FULL;
        this.calls.lost(refusal.error ?? "the plugin refuses");
      }
    } catch (error) {
      if (abort !== this.abort) return;
    }
    if (abort !== this.abort) return;
    if (pause === PAUSE) this.calls.lost("the plugin does not answer");
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.start(), pause);
  }

  /** Begin again if nothing comes for a while: the other side may be gone without a word. */
  watch(abort) {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {
      if (abort !== this.abort) return;
      this.calls.lost("the plugin is silent");
      this.start();
    }, SILENCE);
  }

  async read(body, abort) {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done || abort !== this.abort) return;
      this.watch(abort);
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) this.dispatch(part);
    }
  }

  dispatch(text) {
    let name = "";
    let data = "";
    for (const line of text.split("\n")) {
      if (line.startsWith("event: ")) name = line.slice(7);
      else if (line.startsWith("data: ")) data = line.slice(6);
    }
    if (name === "map" || name === "traffic" || name === "trouble") {
      this.calls[name](JSON.parse(data));
    }
  }
}
