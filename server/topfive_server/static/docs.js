// Draws /openapi.json as a readable page, without anything from elsewhere.
const element = (name, text, ...children) => {
  const node = document.createElement(name);
  if (text) node.textContent = text;
  node.append(...children);
  return node;
};
// Descriptions are Markdown, of which only `code` is used.
const prose = (name, text) => {
  const node = document.createElement(name);
  (text ?? "").split("`").forEach((part, i) => node.append(i % 2 ? element("code", part) : part));
  return node;
};
const table = (rows) => {
  const node = element("table");
  for (const [left, right] of rows) node.append(element("tr", "", element("td", left), prose("td", right)));
  return node;
};
const range = ({ type, anyOf, enum: values, minimum, maximum, default: standard }) => {
  const parts = [values ? values.join(" or ") : type ?? anyOf?.[0].type];
  if (minimum !== undefined) parts.push(`${minimum} to ${maximum}`);
  if (standard !== undefined) parts.push(`default ${standard}`);
  return parts.filter(Boolean).join(", ");
};

const document_ = await (await fetch("/openapi.json")).json();
for (const [path, methods] of Object.entries(document_.paths)) {
  // Methods that do the same are drawn once.
  const kinds = new Map();
  for (const [method, route] of Object.entries(methods)) {
    const same = kinds.get(route.summary) ?? { names: [], route };
    same.names.push(method.toUpperCase());
    kinds.set(route.summary, same);
  }
  for (const { names, route } of kinds.values()) {
    const node = element("article");
    node.className = "route";
    node.append(element("h2", "", element("b", names.join(", ")), ` ${path}`), element("p", route.summary));
    if (route.description) node.append(prose("p", route.description));
    const parameters = (route.parameters ?? []).map((p) => [p.name, `${p.description ?? ""} (${p.in}; ${range(p.schema)})`]);
    if (parameters.length) node.append(table(parameters));
    if (route.requestBody) node.append(prose("p", `Body: ${Object.keys(route.requestBody.content).join(", ")}.`));
    node.append(table(Object.entries(route.responses).map(([status, r]) => [status, r.description])));
    document.getElementById("routes").append(node);
  }
}
