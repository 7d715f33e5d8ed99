"use strict";

const at = (id) => document.getElementById(id);

function addAnswer() {
  const label = document.createElement("label");
  const field = document.createElement("textarea");
  field.rows = 3;
  field.className = "answer";
  label.append(`Answer ${at("answers").children.length + 1} `, field);
  at("answers").append(label);
}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (at("key").value) headers.Authorization = `Bearer ${at("key").value}`;
  const response = await fetch(path, { ...options, headers });
  const found = await response.json();
  if (!response.ok) throw new Error(found.error.message);
  return found;
}

function show(found, texts) {
  const rows = found.scores.map((score, k) => [score, texts[k]]).sort((a, b) => b[0] - a[0]);
  at("ranking").tBodies[0].replaceChildren(...rows.map(([score, text]) => {
    const row = document.createElement("tr");
    for (const value of [score.toFixed(4), text]) {
      const cell = document.createElement("td");
      cell.textContent = value; // text, never markup
      row.append(cell);
    }
    return row;
  }));
  at("ranking").hidden = false;
  at("model").textContent = found.model;
}

async function score(event) {
  event.preventDefault();
  at("problem").textContent = "";
  at("ranking").hidden = true;
  const texts = [...document.querySelectorAll(".answer")].map((field) => field.value).filter((text) => text);
  const body = JSON.stringify({ prompt: at("prompt").value, responses: texts });
  try {
    show(await ask("/score", { method: "POST", headers: { "Content-Type": "application/json" }, body }), texts);
  } catch (error) {
    at("problem").textContent = error.message;
  }
}

addAnswer();
addAnswer();
at("more").addEventListener("click", addAnswer);
at("asked").addEventListener("submit", score);
