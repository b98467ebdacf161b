// What may be shown of each camera, never a stale ok. Takes status and state messages, and a tick each second.
// `stale_s` stands before this text: seconds after which a camera is stale, by its name. What counts is when a message
// came by this machine's own clock, so the box's clock need not agree with it.
const now = Date.now();
const seen = context.get("seen") || { agent: null, cameras: {}, shown: {} };
if (typeof msg.topic === "string" && msg.payload && typeof msg.payload === "object") {
    const levels = msg.topic.split("/");
    if (levels[levels.length - 1] === "status") {
        seen.agent = { state: msg.payload.state, came: now };
    } else if (levels[levels.length - 1] === "state") {
        seen.cameras[levels[levels.length - 2]] = { state: msg.payload, came: now };
    }
}
const agentIsThere = seen.agent !== null && seen.agent.state !== "offline" && now - seen.agent.came < 31000;
const out = [];
for (const camera of Object.keys(stale_s)) {
    const known = seen.cameras[camera];
    const isFresh = known !== undefined && now - known.came < (stale_s[camera] + 1) * 1000;
    const verdict = agentIsThere && isFresh ? known.state.verdict : "unknown";
    if (seen.shown[camera] !== verdict) {
        seen.shown[camera] = verdict;
        out.push({ topic: camera, payload: verdict, state: known === undefined ? null : known.state });
    }
}
context.set("seen", seen);
return [out];
