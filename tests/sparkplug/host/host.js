// An independent Sparkplug B host: it shares no code with kizu, only the specification.
//
//   node host.js PORT HOST_ID [GROUP]      reads commands from standard input, one JSON object a line:
//     {"do": "online"}   {"do": "offline"}   {"do": "state", "online": true, "timestamp": 5}   {"do": "state", "text": "ONLINE"}
//     {"do": "rebirth", "group": G, "node": N}   {"do": "dcmd", "group", "node", "device", "metrics": [{name, type, value}]}
//     {"do": "ncmd", ...}   {"do": "raw", "topic", "hex", "retain"}
//
// Writes one JSON object a line: {"kind": "message", …} for each Sparkplug message as it was decoded,
// {"kind": "violation", "id": …, "text": …} for each breach of a requirement (ids without tck-id-), {"kind": "ready"}.
'use strict';
const mqtt = require('mqtt');
const sparkplug = require('sparkplug-payload').get('spBv1.0');
// The package's own decoder drops is_null; its protobuf classes keep it.
const wire = require('sparkplug-payload/lib/sparkplugPayloadProto.js').org.eclipse.tahu.protobuf.Payload;

const [port, hostId] = [Number(process.argv[2]), process.argv[3]];
const DATA = new Set(['NDATA', 'DDATA']);
const SEQUENCED = new Set(['NBIRTH', 'DBIRTH', 'NDATA', 'DDATA', 'DDEATH']);
const TYPES = new Set(['Int32', 'Int64', 'Float', 'Double', 'Boolean', 'String', 'Bytes']);
const nodes = new Map();

const say = (object) => process.stdout.write(JSON.stringify(object) + '\n');
const breach = (id, text) => say({ kind: 'violation', id, text });
const plain = (value) => (value !== null && typeof value === 'object' && 'low' in value ? Number(value.toString()) : value);

function shown(value) {
  if (value === null || value === undefined) return null;
  if (value instanceof Uint8Array) return { bytes: value.length, head: Buffer.from(value.slice(0, 3)).toString('hex') };
  return plain(value);
}

// A node as hosts know it: alive, its bdSeq, the next seq, the metrics of its births.
function nodeOf(group, id) {
  const key = `${group}/${id}`;
  if (!nodes.has(key)) nodes.set(key, { alive: false, bdSeq: null, deadBdSeq: null, next: null, metrics: new Map(), devices: new Map() });
  return nodes.get(key);
}

function checkNames(births, where) {
  const lower = new Set();
  for (const metric of births) {
    if (!metric.name) breach('payloads-name-requirement', `${where}: a metric without a name`);
    if (lower.has(metric.name.toLowerCase())) breach('case-sensitivity-metric-names', `${where}: ${metric.name}`);
    lower.add(metric.name.toLowerCase());
    if (metric.name !== 'Node Control/Rebirth' && !/^[A-Za-z0-9_\-/]+$/.test(metric.name)) breach('payloads-name-requirement', `${where}: ${metric.name}`);
    if (metric.alias !== undefined && metric.alias !== null) breach('operational-behavior-data-commands-rebirth-name-aliases', `${where}: an alias`);
    if (!metric.type || !TYPES.has(metric.type)) breach('payloads-metric-datatype-req', `${where}: ${metric.name} has type ${metric.type}`);
    const isValued = metric.field !== undefined;
    if (metric.isNull && isValued) breach('operational-behavior-data-publish-nbirth-values', `${where}: ${metric.name} is null and has a value`);
    if (!metric.isNull && !isValued) breach('operational-behavior-data-publish-nbirth-values', `${where}: ${metric.name} has neither value nor is_null`);
  }
}

function checkTimes(payload, where) {
  const now = Date.now();
  const stamps = [['payload', payload.timestamp], ...(payload.metrics || []).map((metric) => [metric.name, metric.timestamp])];
  for (const [name, stamp] of stamps) {
    if (stamp === null || stamp === undefined || plain(stamp) === 0) breach('payloads-name-birth-data-requirement', `${where}: ${name} has no timestamp`);
    else if (Math.abs(now - plain(stamp)) > 86400000) breach('payloads-timestamp-in-UTC', `${where}: ${name} is not of today`);
  }
}

function checkSequence(node, kind, payload, where) {
  if (payload.seq === null || payload.seq === undefined) { breach('payloads-sequence-num-always-included', where); return; }
  const seq = plain(payload.seq);
  if (kind === 'NBIRTH') { if (seq !== 0) breach('topics-nbirth-seq-num', `${where}: ${seq}`); }
  else if (node.next !== null && seq !== node.next) breach('payloads-sequence-num-incrementing', `${where}: ${seq} instead of ${node.next}`);
  node.next = (seq + 1) % 256;
}

function bdSeqOf(payload, where) {
  const found = (payload.metrics || []).filter((metric) => metric.name === 'bdSeq');
  if (found.length !== 1) { breach('topics-nbirth-bdseq-included', `${where}: ${found.length} of them`); return null; }
  if (found[0].type !== 'Int64') breach('message-flow-edge-node-birth-publish-nbirth-payload-bdSeq', `${where}: ${found[0].type}`);
  const value = plain(found[0].value);
  if (!(value >= 0 && value <= 255)) breach('message-flow-edge-node-birth-publish-will-message-payload-bdSeq', `${where}: ${value}`);
  return value;
}

function nodeBirth(node, payload, where) {
  const bdSeq = bdSeqOf(payload, where);
  const rebirth = (payload.metrics || []).find((metric) => metric.name === 'Node Control/Rebirth');
  if (!rebirth) breach('topics-nbirth-rebirth-metric', where);
  else if (rebirth.type !== 'Boolean' || rebirth.value !== false) breach('topics-nbirth-rebirth-metric', `${where}: ${rebirth.type} ${rebirth.value}`);
  checkNames(payload.metrics || [], where);
  if (node.alive && bdSeq !== node.bdSeq) breach('payloads-nbirth-bdseq-repeat', `${where}: ${bdSeq} after ${node.bdSeq} without an NDEATH`);
  // After a death a new CONNECT was needed, and it has the next number; a gap means CONNECTs that never came to births.
  if (!node.alive && node.deadBdSeq !== null && bdSeq === node.deadBdSeq) breach('topics-nbirth-bdseq-increment', `${where}: ${bdSeq} again after its NDEATH`);
  Object.assign(node, { alive: true, bdSeq, metrics: new Map((payload.metrics || []).map((metric) => [metric.name, metric.type])) });
  node.devices.clear();
  node.hasData = false;
}

function nodeDeath(node, payload, where, packet) {
  if (payload.seq !== null && payload.seq !== undefined) breach('topics-ndeath-seq', where);
  const names = (payload.metrics || []).map((metric) => metric.name);
  if (names.join() !== 'bdSeq') breach('topics-ndeath-payload', `${where}: ${names.join()}`);
  const bdSeq = bdSeqOf(payload, where);
  if (packet.qos !== 1) breach('message-flow-edge-node-birth-publish-will-message-qos', `${where}: QoS ${packet.qos}`);
  if (node.alive && bdSeq !== node.bdSeq) { breach('payloads-ndeath-bdseq', `${where}: ${bdSeq}, the NBIRTH had ${node.bdSeq}`); return; }
  Object.assign(node, { alive: false, deadBdSeq: bdSeq, next: null });
  node.devices.forEach((device) => { device.alive = false; });
}

function checkMetrics(known, payload, where, id) {
  for (const metric of payload.metrics || []) {
    if (!known.has(metric.name)) breach(id, `${where}: ${metric.name} was in no birth`);
    else if (metric.type && known.get(metric.name) !== metric.type) breach(id, `${where}: ${metric.name} was born as ${known.get(metric.name)}, is ${metric.type}`);
  }
  const current = (payload.metrics || []).filter((metric) => !metric.isHistorical);
  for (const name of new Set(current.map((metric) => metric.name))) {
    const stamps = current.filter((metric) => metric.name === name).map((metric) => plain(metric.timestamp));
    if (stamps.some((stamp, index) => index && stamp < stamps[index - 1])) breach('operational-behavior-data-publish-dbirth-order', `${where}: ${name}`);
  }
}

function take(topic, bytes, packet) {
  const [, group, kind, id, deviceId] = topic.split('/');
  if (group === 'STATE' || kind === 'NCMD' || kind === 'DCMD') return;
  const where = `${kind} ${id}${deviceId ? '/' + deviceId : ''}`;
  const isOfDevice = kind.startsWith('D');
  if (isOfDevice !== (deviceId !== undefined)) breach('topic-structure-namespace-device-id-associated-message-types', topic);
  const payload = sparkplug.decodePayload(bytes);
  wire.decode(bytes).metrics.forEach((metric, index) => Object.assign(payload.metrics[index], { isNull: metric.isNull === true, field: metric.value }));
  const node = nodeOf(group, id);
  say({
    kind: 'message', topic, type: kind, node: id, device: deviceId || null, qos: packet.qos, retain: packet.retain,
    seq: plain(payload.seq), timestamp: plain(payload.timestamp),
    metrics: (payload.metrics || []).map((metric) => ({
      name: metric.name, type: metric.type || null, value: shown(metric.value), isNull: Boolean(metric.isNull),
      historical: Boolean(metric.isHistorical), timestamp: plain(metric.timestamp),
      contentType: (metric.metadata && metric.metadata.contentType) || null,
    })),
  });
  if (packet.retain) breach(`topics-${kind.toLowerCase()}-mqtt`, `${where}: retained`);
  if (kind === 'NDEATH') { nodeDeath(node, payload, where, packet); return; }
  if (packet.qos !== 0) breach(`topics-${kind.toLowerCase()}-mqtt`, `${where}: QoS ${packet.qos}`);
  checkTimes(payload, where);
  if (SEQUENCED.has(kind)) checkSequence(node, kind, payload, where);
  if (kind === 'NBIRTH') { nodeBirth(node, payload, where); return; }
  if (!node.alive) { breach(isOfDevice ? 'message-flow-device-birth-publish-nbirth-wait' : 'principles-birth-certificates-order', `${where}: the node is not born`); return; }
  if (kind === 'DBIRTH') {
    if (node.hasData && !node.devices.has(deviceId)) breach('payloads-dbirth-order', `${where}: after data`);
    checkNames(payload.metrics || [], where);
    node.devices.set(deviceId, { alive: true, metrics: new Map((payload.metrics || []).map((metric) => [metric.name, metric.type])) });
  } else if (kind === 'DDEATH') {
    const device = node.devices.get(deviceId);
    if (!device || !device.alive) breach('operational-behavior-device-ddeath', `${where}: the device is not born`);
    else device.alive = false;
  } else if (kind === 'DDATA') {
    const device = node.devices.get(deviceId);
    node.hasData = true;
    if (!device || !device.alive) breach('payloads-ddata-order', `${where}: the device is not born`);
    else checkMetrics(device.metrics, payload, where, 'operational-behavior-data-publish-dbirth');
  } else if (kind === 'NDATA') {
    node.hasData = true;
    checkMetrics(node.metrics, payload, where, 'operational-behavior-data-publish-nbirth');
  }
  if (DATA.has(kind) && !(payload.metrics || []).length) breach(`topics-${kind.toLowerCase()}-payload`, `${where}: no metrics`);
}

const client = mqtt.connect({
  host: '127.0.0.1', port, protocolVersion: 4, clean: true, clientId: `host-${hostId}-${process.pid}`, reconnectPeriod: 100,
});
client.on('connect', () => {
  client.subscribe({ 'spBv1.0/#': { qos: 1 } }, () => say({ kind: 'ready' }));
});
client.on('message', (topic, bytes, packet) => {
  try { take(topic, bytes, packet); } catch (error) { breach('message-flow-edge-node-birth-publish-nbirth-payload', `${topic}: ${error.message}`); }
});
client.on('error', (error) => say({ kind: 'error', text: error.message }));

const stateTopic = `spBv1.0/STATE/${hostId}`;
const state = (online, timestamp) => client.publish(stateTopic, JSON.stringify({ online, timestamp }), { qos: 1, retain: true });
const command = (topic, metrics) => client.publish(topic, sparkplug.encodePayload({ timestamp: Date.now(), metrics }), { qos: 0 });

const actions = {
  online: () => state(true, Date.now()),
  offline: () => state(false, Date.now()),
  state: (order) => (order.text === undefined ? state(order.online, order.timestamp) : client.publish(stateTopic, order.text, { qos: 1, retain: true })),
  rebirth: (order) => command(`spBv1.0/${order.group}/NCMD/${order.node}`, [{ name: 'Node Control/Rebirth', type: 'Boolean', value: true, timestamp: Date.now() }]),
  ncmd: (order) => command(`spBv1.0/${order.group}/NCMD/${order.node}`, order.metrics),
  dcmd: (order) => command(`spBv1.0/${order.group}/DCMD/${order.node}/${order.device}`, order.metrics),
  raw: (order) => client.publish(order.topic, Buffer.from(order.hex, 'hex'), { qos: 1, retain: Boolean(order.retain) }),
};
require('readline').createInterface({ input: process.stdin })
  .on('line', (line) => { const order = JSON.parse(line); actions[order.do](order); })
  .on('close', () => client.end(true, () => process.exit(0)));
