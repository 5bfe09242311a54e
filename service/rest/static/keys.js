// The dialog that asks for an API key, where the server wants one.

const dialog = document.getElementById("key-dialog");
const input = document.getElementById("key");

export function isAskingForKey() {
  return dialog.open;
}

/** Resolve to the key that a person types, or to "" if the dialog is left without one. */
export function askForKey(wasRefused) {
  document.getElementById("key-text").textContent = wasRefused
    ? "That key was not accepted. Try another one."
    : "It is kept for this tab only, and forgotten when the tab closes.";
  input.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue && input.value), { once: true });
  });
}

document.getElementById("key-cancel").addEventListener("click", () => dialog.close(""));
document.getElementById("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  dialog.close("given");
});
